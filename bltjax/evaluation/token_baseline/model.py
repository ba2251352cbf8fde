"""The token model of a training run from Python: generate, score, logits.

What it yields has the shape of what `api.Model` yields, so that one harness measures both.
"""

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from bltjax import sharding
from bltjax.checkpoints import formats, placing
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.checkpoints.weights import Lengths, Weights, WeightsError, flat, value_problems
from bltjax.config import PatchingConfig, TokenModelConfig
from bltjax.data.tokenizer import Tokenizer
from bltjax.data.tokenizer import load as load_tokenizer
from bltjax.evaluation.continuations import ContinuationScore
from bltjax.evaluation.score import Score
from bltjax.evaluation.token_baseline.generate import Prompt, generate
from bltjax.evaluation.token_baseline.score import score_continuations, score_documents
from bltjax.inference.model_steps import prepared
from bltjax.inference.requests import each
from bltjax.model import functional
from bltjax.runtime.progress import OnProgress

Text = str | bytes
STAGE = "token_model"  # in the working directory of a run


def is_token_run(path: str | os.PathLike) -> bool:
    """Whether a directory is that of a run with a token model, and without a BLT."""
    run = RunDirectory(Path(path))
    return run.evaluated() == "token_model" and not (run.path / formats.MODEL).exists()


def load(
    path: str | os.PathLike,
    mesh: jax.sharding.Mesh,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    on_progress: OnProgress = None,
) -> "TokenModel":
    """The token model of a run, the newest checkpoint; arguments are those of `api.load`.

    Raises ValueError that lists every problem of the directory, or OSError without its tokenizer.
    """
    run = RunDirectory(Path(path))
    stage = run.stage(run.config(), STAGE)
    config = stage.model
    if compute_dtype is not None:
        config = dataclasses.replace(config, compute_dtype=compute_dtype)
    params = {STAGE: stage.lazy_params()}
    if problems := config.problems(STAGE) or value_problems(flat(params), on_progress):
        raise WeightsError(run.path, problems)
    weights = formats.cast(Weights(None, None, PatchingConfig(), params), dtype)
    lengths = Lengths(row_bytes=stage.training.row_bytes)
    found = load_tokenizer(run.tokenizer)
    return TokenModel(config, weights.params[STAGE], found, lengths, mesh)


class TokenModel:
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
        with jax.set_mesh(mesh):
            abstract = jax.tree.map(
                lambda a, leaf: jax.ShapeDtypeStruct(a.shape, leaf.dtype, sharding=a.sharding),
                functional.abstract_params(config),
                params,
            )
            self.params = placing.put_lazy(params, abstract)

    def score(
        self,
        documents: Sequence[Text],
        row_bytes: int | None = None,
        on_progress: OnProgress = None,
    ) -> list[Score]:
        """nats, bytes, ids (as patches) and bits per byte of each document.

        row_bytes: ids of a row; a longer document is scored in several. None: as in training.
        """
        documents = [_bytes_of(d, f"documents[{i}]") for i, d in enumerate(_many(documents))]
        with jax.set_mesh(self.mesh):
            return score_documents(*self._model, documents, self._row(row_bytes), on_progress)

    def score_continuations(
        self,
        pairs: Sequence[tuple[Text, Text]],
        row_bytes: int | None = None,
        on_progress: OnProgress = None,
    ) -> list[ContinuationScore]:
        """nats, bytes and is_greedy of each continuation after its context, in any company."""
        for i, pair in enumerate(pairs):
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise ValueError(f"pairs[{i}] is {pair!r}: give (context, continuation)")
        texts = [
            tuple(_bytes_of(text, f"pairs[{i}]") for text in pair) for i, pair in enumerate(pairs)
        ]
        with jax.set_mesh(self.mesh):
            return score_continuations(*self._model, texts, self._row(row_bytes), on_progress)

    def generate(
        self,
        prompts: Sequence[Text],
        max_new_bytes: int | Sequence[int] = 64,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        stop: Text | Sequence[Text] = (),
        batch_size: int = 32,
    ) -> list[bytes]:
        """The continuation of each prompt, without it, ended by EOS or after `max_new_bytes`.

        stop: strings or bytes that end a text, and are left out of it. max_new_bytes, seed: one
        for all prompts, or one for each. A last token is cut where it is too long. Raises
        ValueError for values that make no sense. Warns where a prompt is longer than a row.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature!r} must be a number 0 or more")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number from 1")
        texts = [_bytes_of(prompt, f"prompts[{i}]") for i, prompt in enumerate(_many(prompts))]
        stops = [stop] if isinstance(stop, Text) else stop
        stops = [_bytes_of(s, "stop") for s in stops]
        if b"" in stops:
            raise ValueError("stop holds an empty string, with which every text ends: leave it out")
        limits = each("max_new_bytes", max_new_bytes, len(texts), 2**30)
        seeds = each("seed", seed, len(texts), 2**32)
        ids = [self.tokenizer.encode(text, add_eos=False) for text in texts]
        longest, trained = max(map(len, ids), default=0), self.lengths.row_bytes
        if longest > trained:
            warnings.warn(
                f"a prompt has {longest} tokens, and the model was trained on {trained}: shorten "
                "it to stay within what it has seen",
                stacklevel=2,
            )
        asked = [Prompt(*row) for row in zip(ids, limits, seeds, strict=True)]
        with jax.set_mesh(self.mesh):
            model = self.config, self._prepared_params, self.tokenizer
            return generate(*model, asked, temperature, stops, batch_size)

    def logits(self, tokens) -> np.ndarray:
        """float32 [B, N, V] logits of the ids after ids int [B, N]; each shape is compiled once."""
        tokens = np.asarray(tokens, np.int32)
        with jax.set_mesh(self.mesh):
            filled = -len(tokens) % sharding.num_row_shards(self.mesh)
            rows = np.concatenate([tokens, np.repeat(tokens[-1:], filled, axis=0)])
            result = _logits(self.config, self.params, sharding.put_batch(rows))
        return np.array(result)[: len(tokens)]

    @property
    def patching(self):
        """Not there, as what asks for it should hear in a sentence."""
        raise ValueError("this is a token model: it has no patches and no stream of bytes")

    stream = patch_lengths = patching

    @property
    def _model(self):
        return self.config, self.params, self.tokenizer

    @functools.cached_property
    def _prepared_params(self) -> dict:
        with jax.set_mesh(self.mesh):
            return prepared({"token_model": self.params})["token_model"]

    def _row(self, row_bytes: int | None) -> int:
        row = self.lengths.row_bytes if row_bytes is None else row_bytes
        if row < 8:
            raise ValueError(f"row_bytes={row} must be at least 8")
        return row


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
    return functional.apply(config, params, tokens)


def _many(texts: Sequence[Text]) -> Sequence[Text]:
    if isinstance(texts, Text):
        raise ValueError(f"one {type(texts).__name__} was given: give a list of them")
    return texts


def _bytes_of(text: Text, name: str) -> bytes:
    if isinstance(text, str):
        return text.encode("utf-8", errors="ignore")
    if not isinstance(text, (bytes, bytearray, memoryview)):
        raise ValueError(f"{name} is {type(text).__name__}: give bytes or str")
    return bytes(text)
