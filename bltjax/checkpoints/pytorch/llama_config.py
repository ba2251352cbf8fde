"""Settings of tokenized models of the Llama family, of Hugging Face and of GGUF files.

They become those of a global transformer, whose layers compute the same. What these cannot express
is a problem that names the value and the remedy. Absent fields have the defaults of transformers.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from bltjax.checkpoints.pytorch.fields import (
    REQUIRED,
    Fields,
    Pair,
    problems_in_their_words,
    read_pairs,
)
from bltjax.checkpoints.pytorch.hf_config import GENERIC, theta
from bltjax.config import TransformerConfig
from bltjax.ops.rotary import LONG, SHORT, scaled

ROPE_THETA, NORM_EPS = 10_000.0, 1e-6  # where a file names none


class Kind(NamedTuple):
    """A family of models, as its `model_type` or its architecture in GGUF files says."""

    qkv_bias: bool = False
    qk_norm: bool = False
    num_kv_heads: Any = REQUIRED  # where the file has none; None: those of the queries
    head_dim: Any = None  # where the file has none; None: dim / heads
    window: int | None = None  # where the file says nothing


KINDS = {
    "llama": Kind(num_kv_heads=None),
    "mistral": Kind(window=4096),
    "qwen2": Kind(qkv_bias=True),
    "qwen3": Kind(qk_norm=True, head_dim=REQUIRED),
}
GGUF_KINDS = ("llama", "qwen2", "qwen3")  # Mistral's are called llama

# Fields of Hugging Face's that change nothing in the layers.
_IGNORED = """
    is_llama_config max_window_layers mlp_dropout pretraining_tp tie_word_embeddings
    'transformers.js_config'
"""
_WHY_NO_SCALING = (
    "a patch is a position, of 4.5 bytes or so, and texts up to the length before scaling need "
    "none: leave it out with --drop_rope_scaling"
)
_LENGTHS = tuple(2**n for n in range(10, 18))  # original positions that GGUF files may mean


class Settings(NamedTuple):
    """Settings of a tokenized model, which tell the shapes of its tensors."""

    stack: TransformerConfig
    kind: str
    vocab_size: int | None
    notes: tuple[str, ...]


def read_hf(config: dict, drop_rope_scaling: bool, problems: list[str]) -> Settings | None:
    """Reads a config.json. Where something is wrong, it is added to `problems`: the result is None.

    drop_rope_scaling: positions are not scaled, whatever the source does.
    """
    if not config:
        return None
    name = config.get("model_type")
    if not isinstance(name, str) or name not in KINDS:
        problems.append(
            f"config.model_type={str(name)[:60]!r} is none of {', '.join(KINDS)}: choose a model "
            "of these families"
        )
        return None
    fields, kind = Fields("config", config), KINDS[name]
    fields.ignore([*GENERIC.split(), *_IGNORED.split()])
    fields.ignore(g for g in ("rope_scaling", "rope_parameters") if config.get(g) is None)
    pairs = _hf_pairs(kind)
    values = read_pairs(fields, pairs)
    values["rope_theta"] = theta(fields, "", ROPE_THETA)
    notes, group = [], "rope_parameters" if config.get("rope_scaling") is None else "rope_scaling"
    if drop_rope_scaling:
        fields.ignore(["rope_parameters", "rope_scaling"])
        notes += _dropped(config.get(group))
    else:
        values |= _hf_scaling(fields, group)
    vocab_size = fields.take("vocab_size", int, least=1)
    _check_supported(fields, name)
    _check_window(fields, config, name)
    fields.check_all_known()
    stack = _stack(fields, values, kind, pairs, problems)
    return stack and Settings(stack, name, vocab_size, (*_assumed(fields), *notes))


def _hf_pairs(kind: Kind) -> list[Pair]:
    return [
        Pair("dim", "hidden_size", int),
        Pair("num_layers", "num_hidden_layers", int),
        Pair("num_heads", "num_attention_heads", int),
        Pair("num_kv_heads", "num_key_value_heads", int, kind.num_kv_heads),
        Pair("head_dim", "head_dim", int, kind.head_dim),
        Pair("ffn_width", "intermediate_size", int),
        Pair("norm_eps", "rms_norm_eps", float, NORM_EPS),
    ]


def _stack(
    fields: Fields, values: dict, kind: Kind, pairs: Iterable[Pair], problems: list[str]
) -> TransformerConfig | None:
    """Returns a stack of these values; None, and problems, where there are some."""
    problems += fields.problems
    if fields.problems:
        return None
    dim, heads = values["dim"], values["num_heads"]
    if values["num_kv_heads"] == heads:
        values["num_kv_heads"] = None
    if heads and dim % heads == 0 and values["head_dim"] == dim // heads:
        values["head_dim"] = None
    stack = TransformerConfig(**values, qkv_bias=kind.qkv_bias, qk_norm=kind.qk_norm)
    wrong = problems_in_their_words(stack, fields.name, pairs)
    problems += wrong
    return None if wrong else stack


def _assumed(fields: Fields) -> tuple[str, ...]:
    """Returns a note on the values that were assumed, but for those that follow from others."""
    fields.assumed = {path: x for path, x in fields.assumed.items() if x is not None}
    return fields.notes()


def _hf_scaling(fields: Fields, group: str) -> dict:
    """Takes how positions are scaled: none, all frequencies, or those of long waves (Llama 3)."""
    older = fields.take(f"{group}.type", str, "default")
    kind = fields.take(f"{group}.rope_type", str, older)
    for name in ("type", "rope_type"):
        fields.assumed.pop(f"{group}.{name}", None)
    if kind == "default":
        fields.ignore([f"{group}.factor"])
        return {}
    if kind == "linear":
        return dict(rope_factor=fields.take(f"{group}.factor", float))
    if kind != "llama3":
        fields.must_be(f"{group}.rope_type", ("linear", "llama3"), _WHY_NO_SCALING)
        fields.must_be(f"{group}.type", ("linear", "llama3"), _WHY_NO_SCALING)
        fields.ignore([group])
        return {}
    fields.must_be(f"{group}.low_freq_factor", (LONG, int(LONG)), f"only {LONG} is known")
    fields.must_be(f"{group}.high_freq_factor", (SHORT, int(SHORT)), f"only {SHORT} is known")
    return dict(
        rope_factor=fields.take(f"{group}.factor", float),
        rope_original_positions=fields.take(f"{group}.original_max_position_embeddings", int),
    )


def _dropped(group) -> list[str]:
    """Returns a note on scaling that is left out."""
    kind = group.get("rope_type", group.get("type")) if isinstance(group, dict) else None
    if kind in (None, "default"):
        return []
    return [f"rope scaling of kind {str(kind)[:60]!r} is left out: positions are not scaled"]


def _check_supported(fields: Fields, name: str):
    """Checks fields that have one supported value."""
    fields.must_be("hidden_act", ("silu",), "feed-forward layers are SwiGLU", assume="silu")
    fields.must_be("quantization_config", (), "save the weights in bfloat16 or float32 instead")
    fields.must_be("mlp_bias", (False,), "feed-forward layers have no biases")
    if name == "qwen2":  # its queries, keys and values have biases, whatever it says
        fields.ignore(["attention_bias"])
    fields.must_be("attention_bias", (False,), "the layer after attention has no bias")
    for path in ("partial_rotary_factor", "rope_parameters.partial_rotary_factor"):
        fields.must_be(path, (1.0, 1), "rotary embedding turns whole heads")
    for path in ("rope_interleaved", "use_mrope"):
        fields.must_be(path, (False,), "heads are turned in halves, by one position")


def _check_window(fields: Fields, config: dict, name: str):
    """Checks that no window is shorter than the longest text of the source."""
    switch = fields.take("use_sliding_window", bool, False)
    kinds = fields.take("layer_types", list, [])
    fields.take("sliding_window", int, None)
    longest = fields.take("max_position_embeddings", int, least=1)
    for path in ("use_sliding_window", "layer_types", "sliding_window"):
        fields.assumed.pop(path, None)
    for other in {str(k)[:60] for k in kinds or ()} - {"full_attention", "sliding_attention"}:
        fields.problems.append(
            f"config.layer_types has {other!r}: only full_attention is known, choose another model"
        )
    window = config.get("sliding_window", KINDS[name].window)
    acts = name == "mistral" or (name != "llama" and switch)
    if acts and isinstance(window, int) and isinstance(longest, int) and window < longest:
        fields.problems.append(window_problem("config.sliding_window", window, longest))


def window_problem(name: str, window: int, longest: int) -> str:
    """Tells that layers have a window, which those of a global transformer have not."""
    return (
        f"{name}={window} is less than the longest text, {longest}: the global transformer sees "
        "all earlier patches, since windows are for bytes; set it to null to have these layers "
        "see as much"
    )


def read_gguf(
    metadata: dict, factors: np.ndarray | None, drop_rope_scaling: bool, problems: list[str]
) -> Settings | None:
    """Reads the metadata of a GGUF file, nested by the dots in their names; see `read_hf`.

    factors: the tensor rope_freqs.weight [D / 2], by which frequencies are divided.
    """
    general = metadata.get("general")
    name = general.get("architecture") if isinstance(general, dict) else None
    if not isinstance(name, str) or name not in GGUF_KINDS:
        problems.append(
            f"general.architecture={str(name)[:60]!r} is none of {', '.join(GGUF_KINDS)}: choose a "
            "model of these families"
        )
        return None
    fields = Fields("metadata", {name: metadata.get(name, {})})
    kind, pairs = KINDS[name], _gguf_pairs(name, KINDS[name])
    values = read_pairs(fields, pairs)
    values |= {n: _shortest(values[n]) for n in ("norm_eps", "rope_theta")}
    notes = _gguf_scaling(fields, name, values, factors, drop_rope_scaling)
    _check_gguf(fields, name, values)
    fields.check_all_known()
    stack = _stack(fields, values, kind, pairs, problems)
    return stack and Settings(stack, name, None, (*_assumed(fields), *notes))


def _gguf_pairs(name: str, kind: Kind) -> list[Pair]:
    attention = f"{name}.attention"
    return [
        Pair("dim", f"{name}.embedding_length", int),
        Pair("num_layers", f"{name}.block_count", int),
        Pair("num_heads", f"{attention}.head_count", int),
        Pair("num_kv_heads", f"{attention}.head_count_kv", int, kind.num_kv_heads),
        Pair("head_dim", f"{attention}.key_length", int, kind.head_dim),
        Pair("ffn_width", f"{name}.feed_forward_length", int),
        Pair("norm_eps", f"{attention}.layer_norm_rms_epsilon", float),
        Pair("rope_theta", f"{name}.rope.freq_base", float, ROPE_THETA),
    ]


def _shortest(value: float | None) -> float | None:
    """Returns a float32 as the shortest number that rounds to it, such as 1e-05."""
    return None if value is None else float(str(np.float32(value)))


def _check_gguf(fields: Fields, name: str, values: dict):
    width = values["head_dim"] or (values["dim"] or 0) // (values["num_heads"] or 1)
    same = (width,), f"heads are {width} wide"
    fields.must_be(f"{name}.rope.dimension_count", *same)
    fields.must_be(f"{name}.attention.value_length", *same)
    fields.must_be(f"{name}.expert_count", (0,), "feed-forward layers have no experts")
    fields.ignore([f"{name}.vocab_size", f"{name}.tensor_data_layout", f"{name}.expert_used_count"])
    longest = fields.take(f"{name}.context_length", int, least=1)
    window = fields.take(f"{name}.attention.sliding_window", int, None)
    fields.assumed.pop(f"{name}.attention.sliding_window", None)
    if window and longest and window < longest:
        where = f"{fields.name}.{name}.attention.sliding_window"
        fields.problems.append(window_problem(where, window, longest))


def _gguf_scaling(fields: Fields, name: str, values: dict, factors, drop: bool) -> list[str]:
    """Adds how positions are scaled to `values`; returns notes."""
    group, there = f"{name}.rope.scaling", factors is not None
    if drop:
        kind = fields.take(f"{group}.type", str, "llama3" if there else "none")
        fields.assumed.pop(f"{group}.type", None)
        fields.ignore([group])
        return [] if kind == "none" else _dropped(dict(type=kind))
    kind = fields.take(f"{group}.type", str, "none")
    fields.assumed.pop(f"{group}.type", None)
    fields.must_be(f"{group}.type", ("none", "linear"), _WHY_NO_SCALING)
    fields.ignore([f"{group}.{n}" for n in ("original_context_length", "finetuned", "attn_factor")])
    if kind == "linear":
        values["rope_factor"] = _shortest(fields.take(f"{group}.factor", float))
    elif kind == "none":
        fields.ignore([f"{group}.factor"])
    else:
        fields.ignore([group])
    if there and not fields.problems:
        values |= _scaling_of_factors(fields, values, factors)
    return []


def _scaling_of_factors(fields: Fields, values: dict, factors: np.ndarray) -> dict:
    """Finds the scaling that has these factors, which is all that GGUF files keep of it."""
    width, factor = 2 * len(factors), float(factors.max(initial=1.0))
    if factor == factors.min(initial=factor):
        return dict(rope_factor=factor)
    plain = values["rope_theta"] ** (-np.arange(0, width, 2) / width)
    for positions in _LENGTHS:
        if np.allclose(factors, plain / scaled(plain, factor, positions), rtol=1e-4, atol=0):
            return dict(rope_factor=factor, rope_original_positions=positions)
    fields.problems.append(
        "rope_freqs.weight has factors of frequencies that are not Llama 3's: " + _WHY_NO_SCALING
    )
    return {}
