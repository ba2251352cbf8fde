"""Maps our parameters to the tensors of Meta's and Hugging Face's files, and back.

One table of names serves both directions. Matrices are [out, in] and rotary pairs interleaved in
all formats, so nothing is transposed or permuted. Tensors are stacked (layers; n-gram tables in
Meta's files) or cut apart (n-gram tables in Hugging Face's files), and n-gram tables get the extra
rows that they have in memory, or lose them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bltjax.checkpoints.lazy_arrays import (
    Joined,
    LazyArray,
    Member,
    Split,
    Stacked,
    WithRows,
    insert,
    tree_leaves,
)
from bltjax.checkpoints.weights import shape_problems, shapes
from bltjax.config import BLTConfig, TransformerConfig
from bltjax.model import functional
from bltjax.model.local_decoder import MASK

META, HF = "meta", "hf"  # styles of names
MASK_EMBEDDING = ("local_decoder", MASK, "weight")  # has no name there
_NEVER_SAID = ("qkv_bias", "qk_norm", "rope_factor")  # of stacks


# Left by data parallelism, compilation, sharding and recomputation, anywhere in a name.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def without_wrappers(name: str, style: str) -> str:
    """Returns the published name of a tensor that was saved from inside of wrappers.

    Besides what PyTorch adds, they may call the model `model`.
    """
    bare = re.sub(r"^(model\.)+", "", _WRAPPERS.sub("", name))
    return bare if style == META or bare.startswith("lm_head.") else f"model.{bare}"


class Name(NamedTuple):
    """Published names of one of our parameters; `{}` stands for the number of a layer or table.

    Our path is Meta's name without the number. A stacked parameter whose published name has no
    number is one tensor there, joined along the first axis.
    """

    meta: str
    hf: str

    @property
    def path(self) -> tuple[str, ...]:
        return (*(part for part in self.meta.split(".") if part != "{}"), "weight")

    @property
    def stacked(self) -> bool:
        return "{}" in self.meta

    def tensor(self, style: str, i: int | None = None) -> str:
        return f"{getattr(self, style).format(i)}.weight"


def _under(prefix: Name, names: dict[str, str]) -> list[Name]:
    return [Name(f"{prefix.meta}.{meta}", f"{prefix.hf}.{hf}") for meta, hf in names.items()]


BLOCK = {  # below the number of a layer
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CROSS = {
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "cross_attn_norm_q": "q_norm",
    "cross_attn_norm_kv": "k_norm",
}


def _same(name: str) -> Name:
    return Name(name, f"model.{name}")


HASH_TABLES = Name("encoder_hash_tok_embedding.{}", "model.encoder_hash_tok_embedding")
BLT_NAMES = [
    Name("local_encoder.tok_embeddings", "model.local_encoder.embed_tokens"),
    HASH_TABLES,
    *_under(_same("local_encoder.layers.{}"), BLOCK),
    *_under(_same("local_encoder.cross_attn_layers.{}"), _CROSS),
    _same("local_encoder.patch_embedding_projection"),
    _same("global_transformer.token_embedding_projection"),
    *_under(_same("global_transformer.layers.{}"), BLOCK),
    _same("local_decoder.patch_embedding_projection"),
    *_under(_same("local_decoder.cross_attn_layers.{}"), _CROSS),
    *_under(_same("local_decoder.layers.{}"), BLOCK),
    _same("local_decoder.norm"),
    Name("local_decoder.output", "lm_head"),
]
ENTROPY_MODEL_NAMES = [
    Name("tok_embeddings", "model.patcher.embed_tokens"),
    *_under(Name("layers.{}", "model.patcher.layers.{}"), BLOCK),
    Name("norm", "model.patcher.norm"),
    Name("output", "model.patcher.lm_head"),
]


def to_published(config, params: dict, style: str) -> dict[str, LazyArray]:
    """Converts our nested parameters to lazy tensors by published name; reads only shapes.

    MASK_EMBEDDING is left out.
    """
    tensors, names = {}, names_by_path(config)
    for path, leaf in tree_leaves(params):
        if path == MASK_EMBEDDING:
            continue
        name = names[path]
        if name == HASH_TABLES:
            leaf = WithRows(leaf, config.hash.vocab)
        if not name.stacked:
            tensors[name.tensor(style)] = leaf
        elif "{}" in getattr(name, style):
            for i in range(leaf.shape[0]):
                tensors[name.tensor(style, i)] = Member(leaf, i)
        else:
            tensors[name.tensor(style)] = Joined(leaf)
    return tensors


def from_published(config, tensors: Mapping[str, LazyArray], style: str) -> tuple[dict, list[str]]:
    """Converts lazy tensors by published name to our nested parameters; returns problems too.

    Problems are missing and unexpected tensors, shapes other than the config's, and stacks of
    tensors of several dtypes. With problems the nested parameters are incomplete.
    """
    if too_many := _more_than(config, len(tensors)):
        return {}, too_many
    abstract = functional.abstract_params(config)
    found, expected = shapes(tensors), shapes(to_published(config, abstract, style))
    problems = shape_problems(found, expected)
    params, names = {}, names_by_path(config)
    for path, leaf in tree_leaves(abstract):
        name = names[path]
        wanted = [name.tensor(style, i) for i in range(leaf.shape[0] if name.stacked else 1)]
        wanted = list(dict.fromkeys(wanted))
        if any(found.get(w) != expected[w] for w in wanted):
            continue
        parts = [tensors[w] for w in wanted]
        dtypes = sorted({np.dtype(part.dtype).name for part in parts})
        if len(dtypes) > 1:
            problems.append(
                f"{name.tensor(style, '*')} come in {' and '.join(dtypes)}: cast them to one dtype"
            )
            continue
        joined = _joined(name, parts, style, leaf.shape)
        insert(params, path, WithRows(joined, leaf.shape[1]) if name == HASH_TABLES else joined)
    return params, problems


def expected_shapes(config, style: str, num_tensors: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all published tensors of a config; none of an absurd one."""
    if _more_than(config, num_tensors):
        return {}
    return shapes(to_published(config, functional.abstract_params(config), style))


def _more_than(config, num_tensors: int) -> list[str]:
    """Returns the problem of a config with absurdly many layers, whose names would fill memory."""
    stacks = [getattr(config, field.name) for field in dataclasses.fields(config)]
    layers = sum(s.num_layers for s in stacks if isinstance(s, TransformerConfig))
    if layers <= max(1000, num_tensors):
        return []
    return [f"the config says {layers} layers, and there are {num_tensors} tensors: correct it"]


def unpublished(config) -> list[str]:
    """Names the settings of a model's stacks that no published format can say."""
    plain, found = TransformerConfig(), []
    for field in dataclasses.fields(config):
        stack = getattr(config, field.name)
        if isinstance(stack, TransformerConfig):
            changed = (n for n in _NEVER_SAID if getattr(stack, n) != getattr(plain, n))
            found += [f"{field.name}.{n}={getattr(stack, n)!r}" for n in changed]
    return found


def _joined(name: Name, parts: list[LazyArray], style: str, shape) -> LazyArray:
    if not name.stacked:
        return parts[0]
    return Stacked(parts) if "{}" in getattr(name, style) else Split(parts[0], shape[0])


def names_by_path(config) -> dict[tuple[str, ...], Name]:
    """Returns the published names of a model's parameters by our path."""
    names = BLT_NAMES if isinstance(config, BLTConfig) else ENTROPY_MODEL_NAMES
    return {name.path: name for name in names}
