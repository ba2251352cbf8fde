"""Models from Python: load weights of any format, generate, score, look at patches and logits."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from bltjax import sharding
from bltjax.checkpoints import formats, placing
from bltjax.checkpoints.demo import directory_of
from bltjax.checkpoints.weights import Lengths, Weights
from bltjax.config import BLTConfig, EntropyModelConfig, PatchingConfig
from bltjax.config.chat import ROLES, ChatConfig
from bltjax.data import conversations
from bltjax.evaluation.log_probs import next_byte_log_probs
from bltjax.evaluation.patch_use import patch_use_of_documents
from bltjax.evaluation.score import BLTScoring, ByteScoring, Score
from bltjax.evaluation.text_model import Text, TextModel
from bltjax.evaluation.token_baseline import model as token_model
from bltjax.evaluation.token_baseline.model import TokenModel
from bltjax.inference.conversation import Conversation
from bltjax.inference.decoders import BLTDecoder
from bltjax.inference.jobs import Decoding
from bltjax.inference.requests import make_requests
from bltjax.inference.room import MIN_POSITIONS, room_size
from bltjax.inference.sampling import Sampling
from bltjax.inference.scheduler import Scheduler
from bltjax.model import functional
from bltjax.patching.boundaries import lengths_from_starts, needs_entropies, patch_starts
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.runtime.progress import OnProgress

__all__ = ["Model", "Score", "load"]


def load(
    path: str | os.PathLike,
    *,
    entropy_model: str | os.PathLike | None = None,
    adapter: str | os.PathLike | None = None,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    bf16_compat: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    on_progress: OnProgress = None,
    verify: bool = True,
) -> "Model | TokenModel":
    """Loads the model in a directory: bltjax's, a training run's, Hugging Face's or Meta's.

    load("demo") gives the small model in the package, where the current directory has no "demo".

    Args:
      path: the directory. A run with the stage `token_model` alone gives a TokenModel.
      entropy_model: a directory with the entropy model, where the first has none or another is
        wanted.
      adapter: a directory with a low-rank adapter in PEFT's format, which is added to the matrices.
      dtype: "float32" or "bfloat16" to cast the parameters; None keeps them as they are stored.
      compute_dtype: of activations; None is float32, or what a bltjax model was trained with. The
        entropy model of a BLT is not touched.
      bf16_compat: find patches as the published demo does, with the entropy model in bfloat16 and
        entropies and threshold rounded to it (model.md#rounding). Boundaries near it move.
      mesh: devices to shard over, see `sharding.make_mesh`; None: the mesh that is set, else one
        device.
      on_progress: told the bytes that have been read and checked.
      verify: compare the files with checksums.json, where `convert` wrote one.

    Raises FileNotFoundError, and ValueError that lists every problem of the directory.
    """
    formats.check_dtype(dtype)
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ValueError(f"path={path!r} must be the directory of a model, or 'demo'")
    path = directory_of(path)
    entropy_model = entropy_model and directory_of(entropy_model)
    adapter = adapter and directory_of(adapter)
    mesh = mesh or _mesh_that_is_set() or sharding.make_mesh(devices=jax.devices()[:1])
    if (axes := getattr(mesh, "axis_names", None)) != sharding.MESH_AXES:
        raise ValueError(
            f"the mesh has axes {axes}, must have {sharding.MESH_AXES}: make it with "
            "bltjax.sharding.make_mesh, and give it as mesh="
        )
    if token_model.is_token_run(path):
        if entropy_model is not None or adapter is not None or bf16_compat:
            raise ValueError(
                f"{path} holds a token model: give no entropy_model, no adapter, no bf16_compat"
            )
        return token_model.load(path, mesh, dtype, compute_dtype, on_progress)
    with jax.set_mesh(mesh):
        weights = formats.read(path, entropy_model, on_progress, verify, adapter)
        weights = formats.cast(weights, dtype)
        for name in weights.params:
            sharding.check_model(getattr(weights, name), name, mesh)
        for note in weights.notes:
            warnings.warn(f"{path}: {note}", stacklevel=2)
        return Model(_computing(weights, compute_dtype, bf16_compat), mesh)


class Model(TextModel):
    """A byte latent transformer, its entropy model, or both, on the devices of a mesh.

    config, entropy_config: BLTConfig, EntropyModelConfig, or None for what is not there.
    patching: where patches start. params: {"blt": ..., "entropy_model": ...}, nested dicts of
    sharded arrays, as `functional.apply` takes them.
    """

    def __init__(self, weights: Weights, mesh: jax.sharding.Mesh):
        self.config: BLTConfig | None = weights.blt
        self.entropy_config: EntropyModelConfig | None = weights.entropy_model
        self.patching: PatchingConfig = weights.patching
        self.lengths: Lengths = weights.lengths
        self._chat: ChatConfig | None = weights.chat
        self.mesh = mesh
        with jax.set_mesh(mesh):
            self.params = {
                name: placing.put_model(getattr(weights, name), tree)
                for name, tree in weights.params.items()
            }

    def logits(self, tokens, patch_lengths=None) -> np.ndarray:
        """Returns float32 [B, N, 260]: next-byte logits of ids int [B, N].

        patch_lengths: int [B, P], rows sum to N + 1 (model.md#patches), zeros right; None: those of
        `patch_lengths(tokens)`. An entropy model alone takes none. Each shape is compiled once.
        """
        tokens = self._tokens(tokens)
        if self.config is None:
            if patch_lengths is not None:
                raise ValueError("patch_lengths are given, but this entropy model has no patches")
            return self._run(_lm_logits, self.entropy_config, "entropy_model", tokens)
        if patch_lengths is None:
            patch_lengths = self.patch_lengths(tokens)
        patch_lengths = _checked_lengths(patch_lengths, tokens)
        return self._run(_blt_logits, self.config, "blt", tokens, patch_lengths)

    def entropies(self, tokens) -> np.ndarray:
        """Returns float32 [B, N] in nats: how uncertain the byte after each of ids int [B, N] is.

        Rows do not see each other, nor do documents that an EOS divides (model.md#entropy, #masks).
        """
        if self.entropy_config is None:
            raise ValueError(
                "there is no entropy model: load with entropy_model=, a directory that has one"
            )
        settings = (self.entropy_config, self.patching.reset_at_newlines)
        return self._run(_entropies, settings, "entropy_model", self._tokens(tokens))

    def patch_lengths(self, tokens) -> np.ndarray:
        """Returns int32 [B, P]: patch lengths of ids int [B, N], sums N + 1 (model.md#patches).

        The last position is the byte to come. P is the largest number of patches in a row; shorter
        rows end in zeros.
        """
        tokens = self._tokens(tokens)
        if self.config is None:
            raise ValueError("this is an entropy model alone, it has no patches")
        entropies = self.entropies(tokens) if needs_entropies(self.patching) else None
        rows = [lengths_from_starts(row) for row in patch_starts(self.patching, tokens, entropies)]
        result = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for i, row in enumerate(rows):
            result[i, : len(row)] = row
        return result

    def patch_use(
        self, documents: Sequence[Text], num_rows: int = 64, row_bytes: int | None = None
    ) -> dict:
        """Returns the bits per byte more that disturbed latents cost, see docs/evaluation.md.

        Documents fill rows one after the other, of which `num_rows` at most count. row_bytes: as in
        `score`. Raises ValueError where there are no patches.
        """
        scoring = self._scoring()
        if not isinstance(scoring, BLTScoring):
            raise ValueError("this is an entropy model alone: it has no patches to use")
        row_bytes = self.lengths.row_bytes if row_bytes is None else row_bytes
        with jax.set_mesh(self.mesh):
            return patch_use_of_documents(scoring, documents, num_rows, row_bytes)

    def log_probs(self, documents: Sequence[Text]) -> list[np.ndarray]:
        """Returns float32 [bytes + 1, 260] of each document: log p of the id after each byte.

        The first row is of what follows BOS. A document is read as one row, however long it is; see
        `evaluation.log_probs`.
        """
        with jax.set_mesh(self.mesh):
            return next_byte_log_probs(self._scoring(), documents)

    def scheduler(self, rows: int = 8, max_length: int = 8192, keep_prefixes: int = 0) -> Scheduler:
        """Returns a Scheduler, which continues prompts as they come.

        rows: slots in each of its rooms. max_length: bytes of a prompt and its continuation, and
        BOS; the largest room has the next power of two. keep_prefixes: see Scheduler.
        """
        decoder, longest = self._decoder(), room_size(max_length)
        sizes = sorted({max(MIN_POSITIONS, longest // share) for share in (1, 4, 16)})
        with jax.set_mesh(self.mesh):
            params, decoding = self._generation_params, Decoding(batch_size=rows)
            return Scheduler(decoder, params, decoding, sizes, keep_prefixes=keep_prefixes)

    def chat(
        self,
        messages: Sequence[Mapping],
        max_new_bytes: int = 512,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Returns the assistant's answer to a conversation.

        messages: dicts with `role` ("system", "user" or "assistant") and `content`. Where they go
        on from the call before, with its answer, only what is new is read; that changes no byte.
        Other arguments are those of `generate`. Raises ValueError for a model that was not trained
        on conversations, and for messages that are none.
        """
        pieces = self.chat_stream(
            messages,
            max_new_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        return b"".join(pieces).decode("utf-8", "replace")

    def chat_stream(
        self,
        messages: Sequence[Mapping],
        max_new_bytes: int = 512,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> Iterator[bytes]:
        """Yields the assistant's answer in pieces; arguments are those of `chat`."""
        chat = self.chat_template()
        prompt = conversations.to_bytes(messages, chat, answer=True)
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, False)
        row = self._decoder(), [prompt], max_new_bytes, seed, self.lengths.row_bytes
        (request,) = make_requests(*row)
        stops = [chat.delimiter(name) for name in ("end", *ROLES)]
        with jax.set_mesh(self.mesh):
            pieces = self._conversation.stream(request, sampling, stops)
        return (piece for piece, _ in pieces)

    def chat_template(self) -> ChatConfig:
        """Returns how turns look. Raises ValueError where the model knows no conversations."""
        if self._chat is None:
            raise ValueError(
                "this model was not trained on conversations: train it on a source of the kind "
                "'chat' (docs/finetuning.md), or use generate"
            )
        return self._chat

    @functools.cached_property
    def _conversation(self) -> Conversation:
        return Conversation(self._decoder(), self._generation_params)

    def _decoder(self) -> BLTDecoder:
        if self.config is None:
            raise ValueError("this is an entropy model alone: generating needs a BLT")
        self._check_patches_can_be_found()
        return BLTDecoder(self.config, self.entropy_config, self.patching)

    def _scoring(self) -> ByteScoring:
        if self.config is None:
            return ByteScoring(self._main_config, self.params["entropy_model"])
        self._check_patches_can_be_found()
        entropy_model = self.entropy_config, self.params.get("entropy_model")
        return BLTScoring(self.config, self.params["blt"], *entropy_model, self.patching)

    @property
    def _main_config(self) -> BLTConfig | EntropyModelConfig:
        config = self.config or self.entropy_config
        assert config is not None  # directories without any model are not read
        return config

    def _check_patches_can_be_found(self):
        if needs_entropies(self.patching) and self.entropy_config is None:
            raise ValueError(
                "patches need an entropy model, and there is none: name a directory that has one "
                "with --entropy_model=DIR, in Python load(entropy_model=)"
            )

    def _tokens(self, tokens) -> np.ndarray:
        """Returns int32 [B, N]; ValueError for another rank, no ids, or ids that no model knows."""
        tokens, vocab_size = _array("tokens", tokens), self._main_config.vocab_size
        if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"tokens are {tokens.dtype} {tokens.shape}: give integers [rows, ids], for example "
                "bltjax.vocabulary.encode(text)[None]"
            )
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError(
                f"tokens lie in {tokens.min()}..{tokens.max()}: ids are 0..{vocab_size - 1}"
            )
        return tokens.astype(np.int32)

    def _run(self, function, settings, params: str, *rows) -> np.ndarray:
        """Runs function(settings, params, *rows) on a batch filled up to what the mesh splits."""
        num_rows = len(rows[0])
        with jax.set_mesh(self.mesh):
            shards = sharding.num_row_shards(self.mesh)
            padded = [
                np.concatenate([x, np.repeat(x[-1:], -num_rows % shards, axis=0)]) for x in rows
            ]
            result = function(settings, self.params[params], *map(sharding.put_batch, padded))
        return np.array(result)[:num_rows]


@functools.partial(jax.jit, static_argnums=0)
def _blt_logits(config, params, tokens, patch_lengths):
    patches = buffers_from_lengths(patch_lengths, tokens.shape[1])
    return functional.apply(config, params, tokens, patches)


@functools.partial(jax.jit, static_argnums=0)
def _lm_logits(config, params, tokens):
    return functional.apply(config, params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _entropies(settings, params, tokens):
    config, reset_at_newlines = settings
    return functional.entropies(config, params, tokens, reset_at_newlines)


def _array(name: str, values) -> np.ndarray:
    """Returns the values as an array. Raises ValueError for rows of different lengths."""
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} have rows of different lengths: pad them to one length") from None


def _checked_lengths(patch_lengths, tokens: np.ndarray) -> np.ndarray:
    lengths = _array("patch_lengths", patch_lengths)
    rows, num_ids = tokens.shape
    if lengths.ndim != 2 or len(lengths) != rows or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"patch_lengths are {lengths.dtype} {lengths.shape}: give integers [{rows}, patches]"
        )
    if (lengths < 0).any() or ((lengths[:, :-1] == 0) & (lengths[:, 1:] > 0)).any():
        raise ValueError("patch_lengths must be positive, with zeros only on the right")
    for i, row in enumerate(lengths.tolist()):  # Python's numbers, whose sums do not wrap around
        if sum(row) != num_ids + 1:
            raise ValueError(
                f"patch_lengths of row {i} sum to {sum(row)}: rows of {num_ids} ids sum to "
                f"{num_ids + 1}, with the byte to come"
            )
    return lengths.astype(np.int32)


def _computing(weights: Weights, compute_dtype: str | None, bf16_compat: bool) -> Weights:
    """Returns the weights with the dtypes of computing that `load` was given."""
    main = "entropy_model" if weights.blt is None else "blt"
    if compute_dtype is not None:
        config = dataclasses.replace(getattr(weights, main), compute_dtype=compute_dtype)
        if problems := config.problems(main):
            raise ValueError("; ".join(problems))
        weights = weights._replace(**{main: config})
    entropy_model = weights.entropy_model
    if not bf16_compat:
        return weights
    if entropy_model is None:
        raise ValueError("bf16_compat=True needs an entropy model: give entropy_model=")
    rounded = formats.cast(
        weights._replace(params={"entropy_model": weights.params["entropy_model"]}), "bfloat16"
    )
    return weights._replace(
        entropy_model=dataclasses.replace(entropy_model, compute_dtype="bfloat16"),
        patching=dataclasses.replace(weights.patching, bf16_compat=True),
        params=weights.params | rounded.params,
    )


def _mesh_that_is_set() -> jax.sharding.Mesh | None:
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh
