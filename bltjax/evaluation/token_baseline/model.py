"""The token model of a training run from Python: generate, score, logits.

It answers as `api.Model` does, so that one harness measures both.
"""

import dataclasses
import functools
import os

import jax
import numpy as np

from bltjax import sharding
from bltjax.checkpoints import formats, placing
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.checkpoints.weights import Lengths, Weights, WeightsError, flat, value_problems
from bltjax.config import PatchingConfig, TokenModelConfig
from bltjax.data.tokenizer import Tokenizer
from bltjax.data.tokenizer import load as load_tokenizer
from bltjax.evaluation.score import ByteScoring
from bltjax.evaluation.text_model import Text, TextModel
from bltjax.inference.decoders import PlainDecoder
from bltjax.model import functional
from bltjax.runtime.paths import as_path
from bltjax.runtime.progress import OnProgress

STAGE = "token_model"  # in the working directory of a run


def is_token_run(path: str | os.PathLike) -> bool:
    """Returns whether a directory is that of a run with a token model, and without a BLT."""
    run = RunDirectory(as_path(path))
    return run.evaluated() == "token_model" and not (run.path / formats.MODEL).exists()


def load(
    path: str | os.PathLike,
    mesh: jax.sharding.Mesh,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    on_progress: OnProgress = None,
) -> "TokenModel":
    """Returns the token model of a run, the newest checkpoint; arguments are those of `api.load`.

    Raises ValueError that lists every problem of the directory, or OSError without its tokenizer.
    """
    run = RunDirectory(as_path(path))
    stage = run.stage(run.config(), STAGE)
    config = stage.portable_model
    if compute_dtype is not None:
        config = dataclasses.replace(config, compute_dtype=compute_dtype)
    params = {STAGE: stage.lazy_params()}
    if problems := config.problems(STAGE) or value_problems(flat(params), on_progress):
        raise WeightsError(run.path, problems)
    weights = formats.cast(Weights(None, None, PatchingConfig(), params), dtype)
    lengths = Lengths(row_bytes=stage.training.row_bytes)
    found = load_tokenizer(run.tokenizer)
    stage.check_data(tokenizer=found.digest)
    return TokenModel(config, weights.params[STAGE], found, lengths, mesh)


class TokenModel(TextModel):
    """A transformer of tokens on the devices of a mesh.

    lengths: of which `row_bytes` are ids of a row. params: nested dict of sharded arrays.
    """

    def __init__(
        self,
        config: TokenModelConfig,
        params: dict,
        tokenizer: Tokenizer,
        lengths: Lengths,
        mesh: jax.sharding.Mesh,
    ):
        self.config, self.tokenizer, self.lengths, self.mesh = config, tokenizer, lengths, mesh
        tokenizer.byte_lengths(config.vocab_size)  # raises where the model has too few ids
        with jax.set_mesh(mesh):
            self.params = placing.put_model(config, params)

    def logits(self, tokens) -> np.ndarray:
        """Returns float32 [B, N, V] logits of the ids after ids int [B, N].

        Each shape is compiled once.
        """
        tokens = np.asarray(tokens, np.int32)
        with jax.set_mesh(self.mesh):
            filled = -len(tokens) % sharding.num_row_shards(self.mesh)
            rows = np.concatenate([tokens, np.repeat(tokens[-1:], filled, axis=0)])
            result = _logits(self.config, self.params, sharding.put_batch(rows))
        return np.array(result)[: len(tokens)]

    @property
    def patching(self):
        """Raises ValueError, as there are no patches."""
        raise ValueError("this is a token model: it has no patches")

    patch_lengths = patching

    def _scoring(self) -> "TokenScoring":
        return TokenScoring(self.config, self.params, self.tokenizer)

    def _decoder(self) -> PlainDecoder:
        return PlainDecoder(self.config, self.tokenizer)


@dataclasses.dataclass
class TokenScoring(ByteScoring):
    """A token model as the scorer needs it. Patches of a document are its ids, BOS and EOS too."""

    tokenizer: Tokenizer

    spare = 0

    def __post_init__(self):
        self.num_ids, self.byte_lengths = len(self.tokenizer), self.tokenizer.byte_lengths()

    def encode(self, document: Text) -> np.ndarray:
        return self.tokenizer.encode(document)

    def encode_pair(self, context: bytes, continuation: bytes):
        """Finds the ids of the continuation as lm-eval does.

        They are those of both texts together, without as many as the context alone has; blanks at
        the end of the context count as the continuation's.
        """
        ids = self.tokenizer.encode(context + continuation, add_eos=False)
        first = len(self.tokenizer.encode(context.rstrip(), add_eos=False))
        if continuation:  # the two may join into fewer ids than the context has
            first = max(min(first, len(ids) - 1), 1)
        return ids, first

    def pack(self, documents, row_length: int):
        for packed in super().pack(documents, row_length):
            yield packed._replace(num_patches=len(packed.ids))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
    return functional.apply(config, params, tokens)
