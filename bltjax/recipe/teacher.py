"""The tokenized model that a byte-ified one learns from: checked first, read when a run begins.

What of it is no layer (embeddings, last norm, output matrix) is read again where a run goes on, and
no checkpoint holds it. The layers are those of the model that the run starts from.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from bltjax import sharding
from bltjax.checkpoints.fingerprints import digest
from bltjax.checkpoints.lazy_arrays import LazyArray, blocks, read_all
from bltjax.checkpoints.pytorch import gguf_tokenizer, llama
from bltjax.checkpoints.weights import Weights, flat
from bltjax.config import RunConfig, TransformerConfig
from bltjax.data.records.store import Shard
from bltjax.data.teacher_tokens import TeacherTokenizer
from bltjax.recipe.entropies import sample_documents
from bltjax.runtime.progress import announced
from bltjax.runtime.terminal import printable_name
from bltjax.training.teacher import Teacher

ROOM = 1.25  # columns for tokens over their mean in a row
SAMPLE_BYTES = 1_000_000  # that the mean token is measured on
SOURCE, TOKENIZER = "blt_training.teacher.source", "blt_training.teacher.tokenizer"


def check_teacher(config: RunConfig):
    """Raises ValueError or OSError where the run has a teacher that cannot teach its model.

    No value is read. Needs a mesh to be set.
    """
    if config.blt_training.teacher.source and "blt" in config.stages:
        _opened(config)


def _opened(config: RunConfig) -> tuple[llama.TokenModel, TeacherTokenizer]:
    """Opens the teacher and its tokenizer."""
    source = llama.local_path(config.blt_training.teacher.source)
    stack = config.blt.global_transformer
    drop = (stack.rope_factor, stack.rope_original_positions) == (1.0, None)
    model = llama.read(source, drop_rope_scaling=drop, values=False)
    _check_stack(source, model.settings.stack, stack)
    shapes = dict(norm=(stack.dim,), output=(model.embeddings.shape[0], stack.dim))
    for name, shape in shapes.items():
        found = getattr(model, name)
        if found is None if name == "norm" else found is not None and found.shape != shape:
            told = "missing" if found is None else f"of shape {found.shape}"
            raise ValueError(f"{SOURCE}={source}: its {name} is {told}, and should have {shape}")
    given = config.blt_training.teacher.tokenizer
    path = llama.local_path(given) if given else source
    named = f"{TOKENIZER if given else SOURCE}={path}"
    return model, tokenizer_of(path, named, TOKENIZER, model)


def _check_stack(source: Path, there: TransformerConfig, here: TransformerConfig):
    """Raises ValueError where layers have other shapes than those of the model that learns."""

    def told(stack: TransformerConfig) -> dict:
        derived = ("num_kv_heads", "head_dim", "ffn_width", "ffn_dim_multiplier", "ffn_multiple_of")
        found = {k: v for k, v in dataclasses.asdict(stack).items() if k not in derived}
        return found | {k: getattr(stack, k) for k in ("kv_heads", "head_width", "ffn_dim")}

    ours = told(here)
    apart = [f"{k} {v} there, {ours[k]} here" for k, v in told(there).items() if v != ours[k]]
    if apart:
        raise ValueError(
            f"{SOURCE}={source} has other layers than the global transformer ({'; '.join(apart)}): "
            "give the model that start_from was made of"
        )


def tokenizer_of(path: Path, named: str, setting: str, model: llama.TokenModel) -> TeacherTokenizer:
    """Reads the tokenizer of a model, in a directory, a tokenizer.json or a GGUF file.

    named: what errors call it. setting: that may name another. Raises ValueError, also where the
    model has no embeddings of some of its tokens.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    packed = llama.gguf_file(path)
    try:
        found = gguf_tokenizer.read(packed, setting) if packed else (file.read_text(),)
        tokenizer = TeacherTokenizer(*found)
    except FileNotFoundError as error:
        raise ValueError(
            f"{named}: there is no {file.name}: give the path of one as {setting}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from error
    rows = model.embeddings.shape[0]
    if tokenizer.num_ids > rows:
        raise ValueError(
            f"{named}: its tokenizer has {tokenizer.num_ids} tokens, and the model has embeddings "
            f"of {rows}: give the tokenizer of this model as {setting}"
        )
    return tokenizer


def open_teacher(
    config: RunConfig, shards: list[Shard], row_bytes: int, start: Weights | None
) -> tuple[Teacher, TeacherTokenizer, str]:
    """Reads the teacher of a run; returns it, its tokenizer, and a digest of both.

    start: weights that the run begins with, of which the layers are compared; None: it goes on.
    Raises ValueError where they are others.
    """
    settings = config.blt_training.teacher
    name = printable_name(settings.source)
    with announced(f"blt: reading the teacher {name}"):
        model, tokenizer = _opened(config)
        if start is not None:
            _compare(model, start, settings.source)
        arrays = _arrays(model)
    columns = settings.row_tokens or _columns(tokenizer, shards, row_bytes)
    identity = f"{digest(arrays)} {tokenizer.digest}"
    return Teacher(arrays, min(columns, row_bytes)), tokenizer, identity


def _compare(model: llama.TokenModel, start: Weights, source: str):
    """Raises ValueError where a layer of the teacher is not that of the model that learns."""
    ours = flat(start.params["blt"]["global_transformer"]["layers"])
    for name, array in flat(model.layers).items():
        if not _equal(array, ours[name]):
            raise ValueError(
                f"{SOURCE}={source}: its {name} has other values than that of start_from: give the "
                "model that start_from was made of, before it was trained further"
            )


def _equal(a: LazyArray, b: LazyArray) -> bool:
    return all(
        np.array_equal(np.asarray(a[i], np.float32), np.asarray(b[i], np.float32))
        for i in blocks(a)
    )


def _arrays(model: llama.TokenModel) -> dict:
    """Puts what is no layer on the mesh, whole on every device, float32."""
    found = dict(embeddings=model.embeddings, norm=model.norm)
    if model.output is not None:
        found["output"] = model.output
    read = {name: np.asarray(read_all(x), np.float32) for name, x in found.items()}
    for name, x in read.items():
        if not np.isfinite(x).all():
            raise ValueError(f"{SOURCE}: its {name} has values that are not finite: get it anew")
    mean_square = np.mean(np.square(read["embeddings"], dtype=np.float64))
    return sharding.put_whole(read | dict(mean_square=np.float32(mean_square)))


def _columns(tokenizer: TeacherTokenizer, shards: list[Shard], row_bytes: int) -> int:
    """Returns the columns for tokens of a row, by the mean token of the first documents."""
    texts = [
        document.data
        for documents in sample_documents(shards, False, SAMPLE_BYTES).values()
        for document in documents
    ]
    tokens = sum(len(tokenizer.encode(text[:SAMPLE_BYTES])[0]) for text in texts)
    num_bytes = sum(min(len(text), SAMPLE_BYTES) for text in texts)
    return 1 + math.ceil(ROOM * row_bytes * tokens / max(num_bytes, 1))
