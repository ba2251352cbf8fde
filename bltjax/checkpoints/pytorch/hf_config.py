"""Converts Hugging Face's BltConfig to our settings and back.

Absent fields have the defaults of transformers, whose files may leave out defaults.
"""

import dataclasses
from typing import NamedTuple

from bltjax.checkpoints.pytorch.fields import (
    Fields,
    Pair,
    merged,
    problems_in_their_words,
    read_pairs,
    write_pairs,
)
from bltjax.checkpoints.pytorch.tensor_names import unpublished
from bltjax.checkpoints.weights import Lengths, Weights
from bltjax.config import (
    BLTConfig,
    EntropyModelConfig,
    PatchingConfig,
    TransformerConfig,
    from_config_dict,
)
from bltjax.config.chat import ChatConfig
from bltjax.vocabulary import BOS_ID, EOS_ID, VOCAB_SIZE

# Fields of ours that transformers passes over: rows of training, and how turns of a chat look.
ROW_BYTES, CHAT = "bltjax_row_bytes", "bltjax_chat"
GENERATION = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "use_cache": False}


class _Stack(NamedTuple):
    """A group of settings in the format, with its type and its defaults."""

    group: str
    model_type: str
    dim: int
    num_layers: int
    num_heads: int
    ffn_width: int | None  # None: 8/3 of the width
    rope_theta: float


_ENCODER = _Stack("encoder_config", "blt_local_encoder", 1024, 1, 16, None, 500_000.0)
_GLOBAL = _Stack("global_config", "blt_global_transformer", 2048, 25, 16, 5632, 500_000.0)
_DECODER = _Stack("decoder_config", "blt_local_decoder", 1024, 9, 16, 2816, 500_000.0)
_PATCHER = _Stack("patcher_config", "blt_patcher", 768, 14, 12, 2048, 10_000.0)
_STACKS = (_ENCODER, _GLOBAL, _DECODER, _PATCHER)


def _stack_pairs(ours: str, stack: _Stack) -> list[Pair]:
    group = stack.group
    return [
        Pair(f"{ours}.dim", f"{group}.hidden_size", int, stack.dim),
        Pair(f"{ours}.num_layers", f"{group}.num_hidden_layers", int, stack.num_layers),
        Pair(f"{ours}.num_heads", f"{group}.num_attention_heads", int, stack.num_heads),
        Pair(f"{ours}.num_kv_heads", f"{group}.num_key_value_heads", int, None),
        Pair(f"{ours}.ffn_width", f"{group}.intermediate_size", int, stack.ffn_width),
        Pair(f"{ours}.norm_eps", f"{group}.rms_norm_eps", float, 1e-5),
    ]


_WINDOW = "local_attention_window_len"
_BLT = [
    *_stack_pairs("local_encoder", _ENCODER),
    *_stack_pairs("global_transformer", _GLOBAL),
    *_stack_pairs("local_decoder", _DECODER),
    Pair("local_encoder.window", _WINDOW, int, 512),
    Pair("local_decoder.window", _WINDOW, int, 512),
    Pair("cross_attention.k", "cross_attn_k", int, 2),
    Pair("cross_attention.all_layers_encoder", "encoder_config.cross_attn_all_layers", bool, False),
    Pair("cross_attention.all_layers_decoder", "decoder_config.cross_attn_all_layers", bool, True),
    Pair("hash.sizes", "encoder_hash_byte_group_size", tuple, (3, 4, 5, 6, 7, 8)),
    Pair("hash.vocab", "encoder_hash_byte_group_vocab", int, 500_002),
    Pair("hash.num_functions", "encoder_hash_byte_group_nb_functions", int, 1),
    Pair("vocab_size", "vocab_size", int, VOCAB_SIZE),
]
_ENTROPY_MODEL = [
    *_stack_pairs("transformer", _PATCHER),
    Pair("transformer.window", "patcher_config.sliding_window", int, 512),
    Pair("vocab_size", "patcher_config.vocab_size", int, VOCAB_SIZE),
]
_PATCHING = [
    Pair("threshold", "patching_threshold", float, PatchingConfig.threshold),
    Pair("max_patch_length", "max_patch_length", int, None),
    Pair("patch_size", "patch_size", int, 4),
]

# Fields that any config of any version of transformers may have, and that do not change what a BLT
# computes.
GENERIC = """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation
    _name_or_path add_cross_attention architectures attention_dropout attn_implementation
    auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id patching_batch_size patching_device prefix
    problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id share_encoder_decoder_emb suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache
"""


def read(config: dict, problems: list[str]) -> Weights | None:
    """Reads a config.json as weights that have no parameters yet.

    Where something is wrong, it is added to `problems` and the result is None.
    """
    if not config:
        return None
    fields = Fields("config", config)
    _ignore_what_changes_nothing(fields)
    blt = read_pairs(fields, _BLT)
    patcher = read_pairs(fields, _ENTROPY_MODEL)
    patching = read_pairs(fields, _PATCHING)
    with_patcher = fields.take("patch_in_forward", bool, True)
    stacks = (blt["local_encoder"], blt["global_transformer"], blt["local_decoder"])
    encoder, _, decoder = stacks
    for values, stack in zip((*stacks, patcher["transformer"]), _STACKS, strict=True):
        _complete_stack(fields, values, stack)
    groups = {"bytes": "encoder", "patches": "global", "entropy_bytes": "patcher"}
    longest = {
        ours: fields.take(
            f"{theirs}_config.max_position_embeddings", int, getattr(Lengths(), ours), least=1
        )
        for ours, theirs in groups.items()
    }
    if ROW_BYTES in config:
        longest["row_bytes"] = fields.take(ROW_BYTES, int, least=8)
    lengths = Lengths(**longest)
    chat, turns = _read_chat(fields) if CHAT in config else (None, False)
    _check_supported(fields, blt)
    if not with_patcher:
        unused = [path for path in fields.assumed if path.startswith(f"{_PATCHER.group}.")]
        for path in unused:
            del fields.assumed[path]
    fields.check_all_known()
    problems += fields.problems
    if fields.problems:
        return None
    cross, heads = blt["cross_attention"], ("num_heads", "num_kv_heads")
    cross |= {name: encoder[name] for name in heads}
    if any(decoder[name] != encoder[name] for name in heads):
        cross |= {f"{name}_decoder": decoder[name] for name in heads}
    model = from_config_dict(BLTConfig, blt)
    # transformers always has a projection
    model = dataclasses.replace(model, always_project=not model.has_decoder_projection)
    patching = PatchingConfig(rule="entropy", target_patch_bytes=None, turns=turns, **patching)
    impossible = problems_in_their_words(model, "config", _BLT)
    impossible += problems_in_their_words(patching, "config", _PATCHING)
    entropy_model = None
    if with_patcher:
        entropy_model = from_config_dict(EntropyModelConfig, patcher)
        impossible += problems_in_their_words(entropy_model, "config", _ENTROPY_MODEL)
    problems += impossible
    if impossible:
        return None
    found = (*fields.notes(), *notes(model, patching))
    return Weights(model, entropy_model, patching, {}, lengths, found, chat=chat)


def _read_chat(fields: Fields) -> tuple[ChatConfig | None, bool]:
    """Returns how turns look, and whether patches start at them; None where a field is wrong."""
    kinds = {field.name: type(field.default) for field in dataclasses.fields(ChatConfig)}
    found = {name: fields.take(f"{CHAT}.{name}", kind) for name, kind in kinds.items()}
    turns = fields.take(f"{CHAT}.turns", bool)
    if fields.problems:
        return None, False
    chat = ChatConfig(**found)
    fields.problems += chat.problems(f"config.{CHAT}")
    return chat, turns


def write(weights: Weights, dtype: str, problems: list[str]) -> dict:
    """Writes a config.json for `BltForCausalLM`; adds what it cannot express to `problems`."""
    blt, patching = weights.blt, weights.patching
    problems += _cannot_say(blt, patching)
    stacks = {
        name: _explicit(name, getattr(blt, name), problems)
        for name in ("local_encoder", "global_transformer", "local_decoder")
    }
    encoder, trunk, decoder = stacks.values()
    local = dict(
        cross_attn_k=blt.cross_attention.k, hidden_size_global=trunk.dim, vocab_size=blt.vocab_size
    )
    theirs = [
        write_pairs(dataclasses.replace(blt, **stacks), _BLT, problems),
        write_pairs(patching, _PATCHING, problems),
        _stack_rest(_ENCODER, encoder, weights.lengths.bytes),
        _stack_rest(_GLOBAL, trunk, weights.lengths.patches),
        _stack_rest(_DECODER, decoder, weights.lengths.bytes),
        {"encoder_config": {**local, "sliding_window": encoder.window}},
        {"decoder_config": local},
    ]
    if weights.lengths.row_bytes != Lengths().row_bytes:
        theirs.append({ROW_BYTES: weights.lengths.row_bytes})
    if weights.chat is not None:
        theirs.append({CHAT: dataclasses.asdict(weights.chat) | dict(turns=patching.turns)})
    if blt.patch_width != trunk.dim:
        theirs.append({"global_config": {"encoder_cross_output_size": blt.patch_width}})
    if weights.entropy_model is not None:
        model = weights.entropy_model
        problems += [f"transformers has no entropy_model.{name}" for name in unpublished(model)]
        stack = _explicit("entropy_model.transformer", model.transformer, problems)
        theirs += [
            write_pairs(dataclasses.replace(model, transformer=stack), _ENTROPY_MODEL, problems),
            _stack_rest(_PATCHER, stack, weights.lengths.entropy_bytes),
        ]
    return merged(
        {
            "architectures": ["BltForCausalLM"],
            "model_type": "blt",
            "dtype": dtype,
            "max_position_embeddings": weights.lengths.patches,
            "patch_in_forward": weights.entropy_model is not None,
            "patching_mode": "entropy",
            "rope_parameters": {"rope_theta": trunk.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": False,
            "use_cache": False,
        },
        *theirs,
    )


def _ignore_what_changes_nothing(fields: Fields):
    generic = GENERIC.split()
    fields.ignore(
        [*generic, "max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"]
    )
    for stack in _STACKS:
        fields.ignore(f"{stack.group}.{name}" for name in [*generic, "partial_rotary_factor"])
    fields.ignore(  # derived from other fields, or read nowhere
        [
            "encoder_config.hidden_size_global",
            "encoder_config.sliding_window",
            "decoder_config.max_position_embeddings",
            "decoder_config.sliding_window",
            "decoder_config.vocab_size",
            "global_config.encoder_cross_output_size",
            "global_config.sliding_window",
            "global_config.vocab_size",
        ]
    )


def _complete_stack(fields: Fields, values: dict, stack: _Stack):
    """Adds values that may have older names, and checks fields that have one supported value."""
    group = stack.group
    values["rope_theta"] = theta(fields, f"{group}.", stack.rope_theta)
    fields.must_be(
        f"{group}.norm_eps",
        (values["norm_eps"],),
        f"transformers drops it and takes rms_norm_eps ({values['norm_eps']}): rename or remove it",
    )
    fields.must_be(f"{group}.rope_parameters.rope_type", ("default",), "only plain rotary is known")
    plain = ({"rope_type": "default"}, {"type": "default"}, {})
    fields.must_be(f"{group}.rope_scaling", plain, "only plain rotary embedding is known")
    fields.must_be(
        f"{group}.hidden_act", ("silu",), "feed-forward layers are SwiGLU", assume="silu"
    )
    fields.must_be(f"{group}.tie_word_embeddings", (False,), "the output layer is its own")
    for name in ("attention_bias", "mlp_bias"):
        fields.must_be(f"{group}.{name}", (False,), "layers have no biases")
    if values["dim"] and values["num_heads"]:
        width = values["dim"] // values["num_heads"]
        values["head_dim"] = None if width * values["num_heads"] == values["dim"] else width
        fields.must_be(
            f"{group}.head_dim", (width,), f"heads are hidden_size / heads = {width} wide"
        )
    if values["ffn_width"] is None and values["dim"]:
        values["ffn_width"] = int(8 * values["dim"] / 3)
    # What equals our defaults is left to them.
    if values["num_kv_heads"] == values["num_heads"]:
        values["num_kv_heads"] = None
    if values["dim"] and values["ffn_width"] == TransformerConfig(values["dim"]).ffn_dim:
        values["ffn_width"] = None


def theta(fields: Fields, prefix: str, default: float) -> float:
    """Takes the base of rotary positions under its newer or its older name, after a prefix."""
    newer, older = f"{prefix}rope_parameters.rope_theta", f"{prefix}rope_theta"
    found = fields.take(newer, float, fields.take(older, float, default))
    if not {newer, older} <= fields.assumed.keys():  # one of the two says it
        fields.assumed.pop(newer, None)
    fields.assumed.pop(older, None)
    return found


def _check_supported(fields: Fields, blt: dict):
    fields.must_be(
        "patching_mode", ("entropy",), "transformers knows entropy patching only", assume="entropy"
    )
    fields.must_be("quantization_config", (), "save the weights in bfloat16 or float32 instead")
    fields.must_be("tie_word_embeddings", (False,), "the output layer is its own")
    for field in ("local_attention_window_len", "patcher_config.sliding_window"):
        fields.must_not_be_null(field, "local stacks need a window, set one")
    k, trunk = blt["cross_attention"]["k"], blt["global_transformer"]["dim"]
    for group in ("encoder_config", "decoder_config"):
        fields.must_be(f"{group}.cross_attn_k", (k,), f"cross_attn_k is {k}")
    fields.must_be(
        "decoder_config.hidden_size_global", (trunk,), f"the global hidden_size is {trunk}"
    )
    fields.must_be(
        "encoder_config.vocab_size", (blt["vocab_size"],), f"vocab_size is {blt['vocab_size']}"
    )


def notes(blt: BLTConfig, patching: PatchingConfig) -> tuple[str, ...]:
    """Returns what transformers computes differently with these weights (differences.md)."""
    found = []
    if blt.cross_attention.all_layers_encoder and blt.local_encoder.num_layers > 1:
        found.append(
            "cross-attention after all of several encoder layers: transformers uses only the last "
            "one, the published model and bltjax all of them, so logits differ"
        )
    if patching.max_patch_length is not None:
        found.append(
            f"max_patch_length={patching.max_patch_length}: transformers may read the wrong patch "
            "at the last byte of a row, so its logits may differ there"
        )
    if patching.turns:
        found.append(
            "patching.turns=True: transformers starts no patch at turns, so its patches, and with "
            "them its logits, differ after them"
        )
    return tuple(found)


def _cannot_say(blt: BLTConfig, patching: PatchingConfig) -> list[str]:
    cross = blt.cross_attention
    wrong = {
        "cross_attention.encoder=False": not cross.encoder,
        "cross_attention.decoder=False": not cross.decoder,
        f"cross_attention.window_encoder={cross.window_encoder}": cross.window_encoder,
        f"cross_attention.window_decoder={cross.window_decoder}": cross.window_decoder,
        "cross_attention.doubled_residual=False": not cross.doubled_residual,
        "skip_projection=True": blt.skip_projection,
        f"pooling={blt.pooling!r}": blt.pooling != "max",
        "hash.sizes=()": not blt.hash.sizes,
        f"patching.rule={patching.rule!r}": patching.rule != "entropy",
        "patching.reset_at_newlines=True": patching.reset_at_newlines,
    }
    wrong |= dict.fromkeys(unpublished(blt), True)
    found = [f"transformers has no {setting}" for setting, is_so in wrong.items() if is_so]
    stacks = (("encoder", blt.local_encoder), ("decoder", blt.local_decoder))
    for side, stack in stacks:
        heads = getattr(cross, f"{side}_heads")
        if heads != (stack.num_heads, stack.kv_heads):
            found.append(
                f"cross-attention of the {side} has (query, key) heads {heads}, its self-attention "
                f"{(stack.num_heads, stack.kv_heads)}: transformers has one pair for both"
            )
    return found


def _explicit(name: str, stack: TransformerConfig, problems: list[str]) -> TransformerConfig:
    if stack.head_width * stack.num_heads != stack.dim:
        problems.append(
            f"{name}.head_dim={stack.head_dim}: transformers takes dim / num_heads only"
        )
    return dataclasses.replace(stack, num_kv_heads=stack.kv_heads, ffn_width=stack.ffn_dim)


def _stack_rest(stack: _Stack, ours: TransformerConfig, max_positions: int) -> dict:
    rest = {
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "model_type": stack.model_type,
        "rope_parameters": {"rope_theta": ours.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": False,
    }
    return {stack.group: rest}
