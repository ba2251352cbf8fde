"""Reads tokenized models of the Llama family as layers of a global transformer.

    Hugging Face     a directory: config.json, model.safetensors or shards with an index
    GGUF             a file, quantized or not

Layers are lazy arrays of the source's values, bit for bit. Of queries and keys the rows are in
another order where the source turns halves of a head: here pairs of neighbours turn
(model.md#rotary).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bltjax.checkpoints.demo import existing
from bltjax.checkpoints.lazy_arrays import (
    HalvesAsPairs,
    LazyArray,
    Stacked,
    blocks,
    insert,
    read_all,
    tree_leaves,
)
from bltjax.checkpoints.pytorch import llama_config, reading, safetensors_files
from bltjax.checkpoints.pytorch.fields import read_json
from bltjax.checkpoints.pytorch.gguf_files import open_gguf
from bltjax.checkpoints.pytorch.llama_config import Settings
from bltjax.checkpoints.pytorch.tensor_names import BLOCK, HF
from bltjax.checkpoints.weights import WeightsError, shape_problems, shapes
from bltjax.config import BLTConfig
from bltjax.model import functional
from bltjax.runtime.object_cache import on_disk
from bltjax.runtime.paths import as_path, is_remote
from bltjax.runtime.progress import OnProgress

GGUF = ".gguf"
ROPE_FACTORS = "rope_freqs.weight"  # of GGUF files


class Name(NamedTuple):
    """Names of a parameter: below the layers of ours, and below a layer of each source."""

    ours: str
    hf: str
    gguf: str
    turned: bool = False  # its rows are features that rotary embedding turns


_GGUF_MODULES = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
}
_MODULES = BLOCK | {
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}
_TURNED = ("attention.wq", "attention.wk", "attention.q_norm", "attention.k_norm")
NAMES = {
    name.ours: name
    for module, theirs in _MODULES.items()
    for kind in ("weight", "bias")
    for name in [
        Name(
            f"{module}.{kind}",
            f"{theirs}.{kind}",
            f"{_GGUF_MODULES[module]}.{kind}",
            module in _TURNED,
        )
    ]
}


class Layout(NamedTuple):
    """Names of the tensors of a source."""

    style: str  # attribute of Name
    layer: str
    embeddings: str
    norm: str  # what comes after the layers
    output: str  # absent where it is the embeddings
    others: tuple[str, ...] = ()

    @property
    def after_layers(self) -> tuple[str, ...]:
        """Names of tensors that no layer reads."""
        return self.norm, self.output, *self.others


HF_LAYOUT = Layout(
    "hf", "model.layers.{}.", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
)
GGUF_LAYOUT = Layout(
    "gguf",
    "blk.{}.",
    "token_embd.weight",
    "output_norm.weight",
    "output.weight",
    (ROPE_FACTORS,),
)


class TokenModel(NamedTuple):
    """A tokenized model that was opened; its values were read once, and are not in memory."""

    settings: Settings
    layers: dict  # nested lazy arrays [layers, ...], as in a global transformer
    embeddings: LazyArray  # [vocabulary, dim]
    files: tuple[Path, ...]  # that were read
    norm: LazyArray | None = None  # [dim], after the layers; None: there is none
    output: LazyArray | None = None  # [vocabulary, dim]; None: the embeddings are it


def gguf_file(source: Path) -> Path | None:
    """Returns the GGUF file that a path means: itself, or the only one of a directory."""
    if source.suffix == GGUF and source.is_file():
        return source
    if not source.is_dir() or (source / "config.json").exists():
        return None
    found = sorted(source.glob(f"*{GGUF}"))
    return found[0] if len(found) == 1 else None


def local_path(path: str | os.PathLike) -> Path:
    """Returns where a tokenized model or its tokenizer is; of a directory in a bucket, a copy.

    Raises OSError where there is no such directory in the bucket.
    """
    found = as_path(path)
    return on_disk(existing(found)) if is_remote(found) else found


def stored_bytes(source: Path) -> int:
    """Returns about how many bytes `read` goes through, for progress bars."""
    file = gguf_file(source)
    files = [file] if file else source.glob("*.safetensors")
    return sum(path.stat().st_size for path in files if path.is_file())


def read(
    source: Path,
    drop_rope_scaling: bool = False,
    on_progress: OnProgress = None,
    values: bool = True,
) -> TokenModel:
    """Reads a directory or a GGUF file; needs a mesh to be set. values: whether they are checked.

    Raises WeightsError that lists every problem, FileNotFoundError where nothing is there.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"no such file or directory {source}: give a directory with a tokenized model in "
            "Hugging Face's format, or a GGUF file"
        )
    file = gguf_file(source)
    if file is None and not source.is_dir():
        raise NotADirectoryError(
            f"{source} is a file: give a GGUF file, whose name ends with {GGUF}, or the directory "
            "that it is in"
        )
    problems: list[str] = []
    if file is None:
        opened = _open_hf(source, drop_rope_scaling, problems)
    else:
        opened = _open_gguf(file, drop_rope_scaling, problems)
    settings, tensors, layout = opened.settings, opened.tensors, opened.layout
    layers, expected = {}, None
    if settings is not None:
        layers, wrong, expected = _placed(settings, tensors, layout)
        problems += reading.not_explained(wrong, source, opened.unreadable, HF)
    in_model = {name: x for name, x in tensors.items() if name not in layout.after_layers}
    problems += reading.in_tensors(in_model, expected, on_progress, values=values)
    if problems or settings is None:
        raise WeightsError(source, problems)
    settings = settings._replace(notes=(*settings.notes, *opened.notes))
    after = tensors.get(layout.norm), tensors.get(layout.output)
    return TokenModel(settings, layers, tensors[layout.embeddings], opened.files, *after)


class _Opened(NamedTuple):
    """Settings and tensors of a source. The settings are None where they have problems."""

    settings: Settings | None
    tensors: dict[str, LazyArray]
    layout: Layout
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()  # problems with files of tensors


def _open_hf(directory: Path, drop_rope_scaling: bool, problems: list[str]) -> _Opened:
    config = read_json(directory / "config.json", problems)
    settings = llama_config.read_hf(config, drop_rope_scaling, problems)
    found, unreadable = safetensors_files.open_sharded(directory)
    problems += unreadable
    notes: list[str] = []
    tensors = reading.by_published_name(found.items(), HF, problems, notes)
    files: tuple[Path, ...] = ()
    if not unreadable:
        files = tuple(directory / name for name in reading.files(directory, False))
    return _Opened(settings, tensors, HF_LAYOUT, files, tuple(notes), tuple(unreadable))


def _open_gguf(file: Path, drop_rope_scaling: bool, problems: list[str]) -> _Opened:
    try:
        kinds = (f"{kind}." for kind in llama_config.GGUF_KINDS)
        read = ("general.architecture", "split.count", *kinds)
        metadata, tensors, unreadable = open_gguf(file, read)
    except (OSError, ValueError) as error:
        problems.append(str(error))
        return _Opened(None, {}, GGUF_LAYOUT, ())
    problems += unreadable
    parts = metadata.get("split", {}).get("count", 0)
    if isinstance(parts, int) and parts > 1:
        problems.append(f"{file.name} is one of {parts} parts: merge them with llama-gguf-split")
        return _Opened(None, tensors, GGUF_LAYOUT, (file,))
    factors = tensors.get(ROPE_FACTORS)
    factors = None if factors is None else read_all(factors).reshape(-1)
    settings = llama_config.read_gguf(metadata, factors, drop_rope_scaling, problems)
    return _Opened(settings, tensors, GGUF_LAYOUT, (file,))


def _placed(
    settings: Settings, tensors: Mapping[str, LazyArray], layout: Layout
) -> tuple[dict, list[str], dict[str, tuple[int, ...]]]:
    """Returns layers, problems with them, and the shapes that tensors should have.

    Problems are missing and unexpected tensors, shapes other than the settings', and tensors of
    several dtypes in a stack. With problems the layers are incomplete.
    """
    stack = settings.stack
    if stack.num_layers > max(1000, len(tensors)):
        told = f"the settings say {stack.num_layers} layers, and there are {len(tensors)} tensors"
        return {}, [f"{told}: correct them"], {}
    abstract = functional.abstract_params(BLTConfig(global_transformer=stack))
    leaves = {".".join(p): x for p, x in tree_leaves(abstract["global_transformer"]["layers"])}
    names = {
        ours: [
            layout.layer.format(i) + getattr(NAMES[ours], layout.style)
            for i in range(stack.num_layers)
        ]
        for ours in leaves
    }
    found = shapes({name: x for name, x in tensors.items() if name not in layout.after_layers})
    rows = settings.vocab_size or found.get(layout.embeddings, (0,))[0]
    expected = {layout.embeddings: (rows, stack.dim)}
    expected |= {name: leaves[ours].shape[1:] for ours in leaves for name in names[ours]}
    problems, layers = shape_problems(found, expected), {}
    for ours, theirs in names.items():
        if any(found.get(name) != expected[name] for name in theirs):
            continue
        dtypes = sorted({np.dtype(tensors[name].dtype).name for name in theirs})
        if len(dtypes) > 1:
            problems.append(
                f"{theirs[0]} and those of other layers come in {' and '.join(dtypes)}: cast them "
                "to one dtype"
            )
        parts = [tensors[name] for name in theirs]
        if NAMES[ours].turned and _turns_halves(settings, layout):
            parts = [HalvesAsPairs(part, stack.head_width) for part in parts]
        insert(layers, ours.split("."), Stacked(parts))
    return layers, problems, expected


def _turns_halves(settings: Settings, layout: Layout) -> bool:
    """Returns whether heads are turned in halves; in GGUF files of Llama's they are in pairs."""
    return layout.style == HF_LAYOUT.style or settings.kind != "llama"


def root_mean_square(array: LazyArray) -> float:
    """Returns the root of the mean square of all values, which are read piece by piece."""
    total, count = 0.0, 0
    for index in blocks(array):
        piece = np.asarray(array[index], np.float32)
        total += float(np.sum(piece * piece, dtype=np.float64))
        count += piece.size
    return (total / max(count, 1)) ** 0.5
