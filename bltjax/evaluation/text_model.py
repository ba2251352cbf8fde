"""Generation and scoring of text, the same for every kind of model that has a decoder."""

import abc
import functools
from collections.abc import Callable, Iterator, Sequence

import jax

from bltjax.checkpoints.weights import Lengths
from bltjax.evaluation.continuations import ContinuationScore, score_continuations
from bltjax.evaluation.score import ByteScoring, Score, score_documents
from bltjax.inference.decoders import Decoder, for_generation
from bltjax.inference.engine import generate, stream
from bltjax.inference.jobs import BlockDrafts, Counts, Decoding
from bltjax.inference.requests import as_blocks, configure, make_requests
from bltjax.inference.sampling import Sampling
from bltjax.vocabulary import TEXT

Text = str | bytes


class TextModel(abc.ABC):
    """A model on the devices of a mesh that generates and scores text.

    params: nested dict of sharded arrays. lengths: `row_bytes` are the positions of a row in
    training. A subclass says how it decodes and how it is scored.
    """

    params: dict
    lengths: Lengths
    mesh: jax.sharding.Mesh

    @abc.abstractmethod
    def _decoder(self) -> Decoder:
        """Returns the decoder. Raises ValueError where the model cannot generate."""

    @abc.abstractmethod
    def _scoring(self) -> ByteScoring:
        """Returns the model as the scorer takes it. Raises ValueError where it cannot be scored."""

    @functools.cached_property
    def _generation_params(self) -> dict:
        return for_generation(self._decoder(), self.params)

    def generate(
        self,
        prompts: Sequence[Text],
        max_new_bytes: int | Sequence[int] = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        valid_utf8: bool = False,
        stop: Text | Sequence[Text] = (),
        seed: int | Sequence[int] = 0,
        threshold: float | None = None,
        max_drafts: int = 0,
        blocks: int | BlockDrafts = 0,
        batch_size: int = 32,
        quorum: float = 0.5,
        min_patch_bytes: float = 1.0,
    ) -> list[bytes]:
        """Returns the continuation of each prompt, without the prompt.

        A continuation ends before EOS or a stop string, or after `max_new_bytes`. It depends
        neither on the other prompts nor on the mesh.

        Args:
          prompts: str or bytes, possibly empty.
          max_new_bytes: length of a continuation at most; one number, or one for each prompt.
          temperature: 0 takes the most probable byte, always; 1 draws as the model predicts.
          top_k: draw from the k most probable bytes. None: from all.
          top_p: draw from the most probable bytes that together have this probability.
          min_p: draw from bytes with at least this share of the best byte's probability.
          repetition_penalty: above 1 makes bytes that occurred, in the prompt too, less probable.
          valid_utf8: write UTF-8 only, without half a character at the end.
          stop: strings or bytes that end a text, and are left out of it.
          seed: of what is drawn; one number, or one for each prompt. The same prompt with the same
            seed gives the same text.
          threshold: nats, instead of the trained one, for rules with entropies: a higher one makes
            fewer patches, and generation cheaper.
          max_drafts: bytes drafted past the end of a patch and then verified; 0 drafts none.
          blocks: bytes of a block that are filled in together and then verified, by a model that
            was trained so (`blt.diffusion_block`); 0: none. BlockDrafts has more options.
          batch_size: prompts that are continued at once.
          quorum: share of the rows that wait for a patch before the global transformer runs.
          min_patch_bytes: mean length of patches that there is memory for; 1 is enough for any
            text.

        The last five are of speed and memory: greedy text is the same whatever they are.

        Raises ValueError for values that make no sense. Warns where a text may get longer than
        those that the model was trained on.
        """
        texts, _ = self.generate_and_count(
            prompts,
            max_new_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            valid_utf8=valid_utf8,
            stop=stop,
            seed=seed,
            threshold=threshold,
            max_drafts=max_drafts,
            blocks=blocks,
            batch_size=batch_size,
            quorum=quorum,
            min_patch_bytes=min_patch_bytes,
        )
        return texts

    def generate_and_count(
        self,
        prompts: Sequence[Text],
        max_new_bytes: int | Sequence[int] = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        valid_utf8: bool = False,
        stop: Text | Sequence[Text] = (),
        seed: int | Sequence[int] = 0,
        threshold: float | None = None,
        max_drafts: int = 0,
        blocks: int | BlockDrafts = 0,
        batch_size: int = 32,
        quorum: float = 0.5,
        min_patch_bytes: float = 1.0,
    ) -> tuple[list[bytes], Counts]:
        """Returns what `generate` returns, and the work it took: steps, patches, drafts."""
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, valid_utf8)
        decoding = Decoding(batch_size, max_drafts, quorum, min_patch_bytes, as_blocks(blocks))
        decoder, stops = configure(self._decoder(), sampling, stop, threshold, decoding)
        requests = make_requests(decoder, prompts, max_new_bytes, seed, self.lengths.row_bytes)
        with jax.set_mesh(self.mesh):
            params = self._generation_params
            return generate(decoder, params, requests, sampling, stops, decoding)

    def stream(
        self,
        prompt: Text,
        max_new_bytes: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        valid_utf8: bool = False,
        stop: Text | Sequence[Text] = (),
        seed: int = 0,
        threshold: float | None = None,
        max_drafts: int = 0,
        blocks: int | BlockDrafts = 0,
    ) -> Iterator[tuple[bytes, Counts]]:
        """Yields the continuation of one prompt in pieces, each with the counts so far.

        For text, decode the pieces with `codecs.getincrementaldecoder("utf-8")("replace")`, which
        keeps half a character until its other half has come. Arguments are those of `generate`.
        """
        if not isinstance(prompt, TEXT):
            raise ValueError(f"prompt is a {type(prompt).__name__}: stream takes one str or bytes")
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, valid_utf8)
        decoding = Decoding(max_drafts=max_drafts, blocks=as_blocks(blocks))
        decoder, stops = configure(self._decoder(), sampling, stop, threshold, decoding)
        (request,) = make_requests(decoder, [prompt], max_new_bytes, seed, self.lengths.row_bytes)
        with jax.set_mesh(self.mesh):
            return stream(decoder, self._generation_params, request, sampling, stops, decoding)

    def score(
        self,
        documents: Sequence[Text],
        row_bytes: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Returns nats, bytes, patches and bits per byte of each document; see `score_documents`.

        Args:
          documents: str or bytes. A document's score does not depend on the others.
          row_bytes: a longer document is scored in rows of this many positions, without sight of
            the row before, as in training. None: as the model was trained where that is known,
            else 8192.
          on_progress: called with the number of bytes that were just scored.
        """
        row_bytes = self.lengths.row_bytes if row_bytes is None else row_bytes
        with jax.set_mesh(self.mesh):
            return score_documents(
                self._scoring(), documents, row_bytes=row_bytes, on_progress=on_progress
            )

    def score_continuations(
        self,
        pairs: Sequence[tuple[Text, Text]],
        row_bytes: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[ContinuationScore]:
        """Returns nats, bytes and is_greedy of each continuation after its context.

        pairs: (context, continuation); a result does not depend on the other pairs. Other arguments
        are those of `score`; see `evaluation.continuations`.
        """
        row_bytes = self.lengths.row_bytes if row_bytes is None else row_bytes
        with jax.set_mesh(self.mesh):
            return score_continuations(
                self._scoring(), pairs, row_bytes=row_bytes, on_progress=on_progress
            )
