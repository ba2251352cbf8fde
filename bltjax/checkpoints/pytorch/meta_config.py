"""Converts Meta's settings (ByteLatentTransformerArgs, LMTransformerArgs, PatcherArgs) and ours.

What the fields mean is in model.md#sizes and what files hold in model.md#files.
"""

import dataclasses

from bltjax.checkpoints.pytorch.feed_forward import common_widths
from bltjax.checkpoints.pytorch.fields import (
    Fields,
    Pair,
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
from bltjax.vocabulary import EOS_ID

ROPE_THETA = 10_000.0  # where a file names none; those of a BLT name 500000 (model.md#rotary)
WINDOW = 512  # of the entropy model, fixed by the published loader (model.md#entropy-model)


def _stack_pairs(stack: str, suffix: str, kv_heads: str, window: str | None) -> list[Pair]:
    pairs = [
        Pair(f"{stack}.dim", f"dim{suffix}", int),
        Pair(f"{stack}.num_layers", f"n_layers{suffix}", int),
        Pair(f"{stack}.num_heads", f"n_heads{suffix}", int),
        Pair(f"{stack}.num_kv_heads", kv_heads, int, None),
        Pair(f"{stack}.head_dim", "head_dim", int, None),
        Pair(f"{stack}.rope_theta", "rope_theta", float, ROPE_THETA),
        Pair(f"{stack}.norm_eps", "norm_eps", float, 1e-5),
        Pair(f"{stack}.ffn_dim_multiplier", "ffn_dim_multiplier", float, 1.0),
        Pair(f"{stack}.ffn_multiple_of", "multiple_of", int, 256),
    ]
    return pairs + ([Pair(f"{stack}.window", window, int, WINDOW)] if window else [])


_INIT = [
    Pair("init.std_factor", "init_std_factor", str, "disabled"),
    Pair("init.base_std", "init_base_std", float, None),
    Pair("vocab_size", "vocab_size", int),
]
_BLT = [
    *_stack_pairs("local_encoder", "_local_encoder", "n_kv_heads", "local_attention_window_len"),
    *_stack_pairs("global_transformer", "_global", "n_kv_heads_global", None),
    *_stack_pairs("local_decoder", "_local_decoder", "n_kv_heads", "local_attention_window_len"),
    Pair("cross_attention.encoder", "cross_attn_encoder", bool, False),
    Pair("cross_attention.decoder", "cross_attn_decoder", bool, False),
    Pair("cross_attention.k", "cross_attn_k", int, 1),
    Pair("cross_attention.num_heads", "cross_attn_nheads", int, 1),
    Pair("cross_attention.all_layers_encoder", "cross_attn_all_layers_encoder", bool, False),
    Pair("cross_attention.all_layers_decoder", "cross_attn_all_layers_decoder", bool, False),
    Pair("cross_attention.window_encoder", "cross_attn_window_encoder", int, None),
    Pair("cross_attention.window_decoder", "cross_attn_window_decoder", int, None),
    Pair("hash.sizes", "encoder_hash_byte_group_size", tuple, ()),
    Pair("hash.vocab", "encoder_hash_byte_group_vocab", int, 30_000),
    Pair("hash.num_functions", "encoder_hash_byte_group_nb_functions", int, 3),
    Pair("pooling", "downsampling_by_pooling", str),
    *_INIT,
]
_ENTROPY_MODEL = [*_stack_pairs("transformer", "", "n_kv_heads", "sliding_window"), *_INIT]
# (Field of the patcher, field of the model where the patcher has none, type, default.)
_PATCHING = [
    ("patching_mode", "patching_mode", str, "entropy"),
    ("threshold", "patching_threshold", float, PatchingConfig.threshold),
    ("threshold_add", "patching_threshold_add", float, None),
    ("monotonicity", "monotonicity", bool, False),
    ("max_patch_length", "max_patch_length", int, None),
    ("patch_size", "patch_size", float, 4.5),
]
_PATCHER_IGNORED = """
    data_parallel device entropy_model_checkpoint_dir log_time patching_batch_size patching_device
    realtime_patching
"""
_POOLING = {"avg": "mean", "mean": "mean", "max": "max", "min": "min"}
_MODES = ("entropy", "space", "static", "byte", "bpe")

# Fields that the published code never reads, or that do not change what a model computes.
_IGNORED = {
    "attn_bias_type": "block_causal",
    "attn_impl": "xformers",
    "rope_use_fp32_in_outer_product": True,
    "seed": 42,
    "weight_tying": False,
}
_NULL = """
    conv_kernel_size dim_patch_emb dim_token_emb encoder_ngram_table_dir
    encoder_ngram_to_size_str encoder_preds_low_entropy_toks encoder_preds_random_toks
    entropy_model_checkpoint_dir global_local_decoder_residual_layer ngram_vocab_sizes
    patching_thresholds_str
"""
_OFF = """
    custom_bwd encoder_enable_byte_group_hash encoder_lm_loss fuse_sequence_parallel
    log_patch_lengths loss_parallel patch_in_forward recompute_fc1_out recompute_fc3_out
    sequence_parallel tie_local_encoder_decoder tie_local_encoder_decoder_logits
"""
_ON = """
    cross_attn_use_flex_attention init_use_gaussian norm_affine pad_to_max_length pre_norm
    recompute_attn share_encoder_decoder_emb use_fsdp use_local_encoder_transformer use_rope
"""
_BLT_IGNORED = {
    **_IGNORED,
    **dict.fromkeys(_NULL.split()),
    **dict.fromkeys(_OFF.split(), False),
    **dict.fromkeys(_ON.split(), True),
    "alpha_depth": "disabled",
    "architecture": "vanilla",
    "attn_to_keep": "all",
    "dim": 512,
    "dropout": 0.0,
    "full_logging_n_layers": 4,
    "init_use_depth": "current",
    "layer_ckpt": "all",
    "max_length": 2048,
    "n_heads": 8,
    "n_layers": 8,
    "non_linearity": "swiglu",
    "norm_type": "rmsnorm",
    "output_size": -1,
    "patching_batch_size": 1,
    "patching_device": "cuda",
}
# Fields that do change it: the supported values, and the reason.
_EOS = {"eos_id": ((EOS_ID,), f"documents end with id {EOS_ID}")}
_LIMITED = {
    **_EOS,
    "dim_token": ((), "local widths are dim_local_encoder and dim_local_decoder"),
    "encoder_enable_byte_ngrams": ((False,), "tables of frequent n-grams cannot be read"),
    "entropy_model_is_ngram_model": ((False,), "the entropy model must be a transformer"),
    "pm_size": ((0,), "the vocabulary is bytes and special ids only"),
    "tokenize_with_bpe_delimiter": ((False,), "text is bytes without delimiters"),
    "downsampling_by_pooling": (tuple(_POOLING), "one of max, min, avg"),
    "patching_mode": (_MODES, f"one of {_MODES}"),
}


def read_blt(args: dict, patcher_args: dict, problems: list[str]) -> Weights | None:
    """Reads ByteLatentTransformerArgs and PatcherArgs as weights that have no parameters yet.

    Where something is wrong, it is added to `problems` and the result is None.
    """
    fields, patcher = Fields("args", args), Fields("patcher_args", patcher_args)
    fields.ignore([*_BLT_IGNORED, "cross_attn_init_by_pooling"])
    for key, (allowed, why) in _LIMITED.items():
        fields.must_be(key, allowed, why, assume=EOS_ID if key in _EOS else None)
    fields.must_not_be_null("local_attention_window_len", "local stacks need a window, set one")
    ours = read_pairs(fields, _BLT)
    cross = ours["cross_attention"]
    if cross["encoder"]:
        fields.must_be("cross_attn_init_by_pooling", (True,), "patches start from pooled bytes")
    if cross["encoder"] or cross["decoder"]:  # then there is no default
        fields.take("cross_attn_nheads", int)
        fields.take("cross_attn_k", int)
    else:  # without effect
        fields.assumed.pop("cross_attn_nheads", None)
        fields.assumed.pop("cross_attn_k", None)
    ours["pooling"] = _POOLING.get(ours["pooling"])
    lengths = Lengths(
        bytes=fields.take("max_encoder_seq_length", int, Lengths().bytes, least=1),
        patches=fields.take("max_seqlen", int, Lengths().patches, least=1),
    )
    patching = _read_patching(fields, patcher)
    fields.check_all_known()
    patcher.ignore(_PATCHER_IGNORED.split())
    patcher.check_all_known()
    found = fields.problems + patcher.problems
    if not found:
        config = from_config_dict(BLTConfig, ours)
        found = problems_in_their_words(config, "args", _BLT) + patching.problems("patcher_args")
    problems += found
    if found:
        return None
    return Weights(config, None, patching, {}, lengths, fields.notes())


def _read_patching(fields: Fields, patcher: Fields) -> PatchingConfig:
    patcher.must_be("patching_mode", *_LIMITED["patching_mode"])
    values = {}
    for theirs, models, kind, default in _PATCHING:
        fallback = fields.take(models, kind, default)
        values[theirs] = patcher.take(theirs, kind, fallback)
        if theirs in patcher.assumed:
            del patcher.assumed[theirs]  # then the model's field says it, or is assumed
        else:
            fields.assumed.pop(models, None)
    rule = values["patching_mode"]
    if rule == "entropy" and values["monotonicity"]:
        rule = "monotonic"
    elif rule == "entropy" and values["threshold_add"] is not None:
        rule = "global_monotonic"
    return PatchingConfig(
        rule=rule,
        target_patch_bytes=None,
        threshold=values["threshold"],
        threshold_add=values["threshold_add"] if rule == "global_monotonic" else 0.0,
        patch_size=int(values["patch_size"] or 0),
        max_patch_length=values["max_patch_length"],
        published_skip_at_3=rule == "global_monotonic",
    )


def read_entropy_model(args: dict, problems: list[str]) -> Weights | None:
    """Reads LMTransformerArgs; see `read_blt`."""
    fields = Fields("entropy_model", args)
    fields.ignore(_IGNORED)
    for key, (allowed, why) in _EOS.items():
        fields.must_be(key, allowed, why, assume=EOS_ID)
    ours = read_pairs(fields, _ENTROPY_MODEL)
    longest = fields.take("max_seqlen", int, Lengths().entropy_bytes, least=1)
    lengths = Lengths(entropy_bytes=longest)
    fields.check_all_known()
    found = fields.problems
    if not found:
        config = from_config_dict(EntropyModelConfig, ours)
        found = problems_in_their_words(config, "entropy_model", _ENTROPY_MODEL)
    problems += found
    patching = PatchingConfig(target_patch_bytes=None)
    return None if found else Weights(None, config, patching, {}, lengths, fields.notes())


def write_blt(weights: Weights, problems: list[str]) -> dict:
    """Writes ByteLatentTransformerArgs; what the format cannot express is added to `problems`."""
    config, cross = weights.blt, weights.blt.cross_attention
    if not cross.doubled_residual:
        problems.append("cross_attention.doubled_residual=False: Meta's code always doubles it")
    if (
        config.always_project
        and not dataclasses.replace(config, always_project=False).has_decoder_projection
    ):
        problems.append("always_project=True: Meta's code has no projection between equal widths")
    if config.skip_projection:
        problems.append("skip_projection=True: Meta's code has no layer there")
    problems += [f"{setting}: Meta's code has no such setting" for setting in unpublished(config)]
    sides = [cross.encoder_heads] * cross.encoder + [cross.decoder_heads] * cross.decoder
    if {heads for side in sides for heads in side} - {cross.num_heads}:
        problems.append(
            f"cross_attention has (query, key) heads {sides}: Meta's format has one number for all"
        )
    names = ("local_encoder", "global_transformer", "local_decoder")
    stacks = _plain_stacks({name: getattr(config, name) for name in names}, problems)
    theirs = write_pairs(dataclasses.replace(config, **stacks), _BLT, problems)
    without_cross = {"cross_attn_k": None, "cross_attn_nheads": None}
    pooling = next(t for t, ours in _POOLING.items() if ours == config.pooling)
    fixed = {key: allowed[0] for key, (allowed, _) in _LIMITED.items() if allowed}
    patcher = write_patcher(weights.patching, [])
    repeated = ("patching_mode", "monotonicity", "max_patch_length", "patch_size")
    return {
        **_BLT_IGNORED,
        **fixed,
        **theirs,
        **({} if sides else without_cross),
        **{key: patcher[key] for key in repeated},
        "cross_attn_init_by_pooling": cross.encoder,
        "dim_token": None,
        "downsampling_by_pooling": pooling,
        "encoder_hash_byte_group_size": list(config.hash.sizes) or None,
        "max_encoder_seq_length": weights.lengths.bytes,
        "max_seqlen": weights.lengths.patches,
        "patching_threshold": None,
        "patching_threshold_add": None,
    }


def write_patcher(patching: PatchingConfig, problems: list[str]) -> dict:
    """Writes PatcherArgs; see `write_blt`."""
    if patching.reset_at_newlines:
        problems.append("patching.reset_at_newlines=True: Meta's code never resets at newlines")
    mode = "entropy" if patching.rule in ("monotonic", "global_monotonic") else patching.rule
    if mode not in _MODES:
        problems.append(f"patching.rule={patching.rule!r}: Meta's code has no such rule")
    return {
        "max_patch_length": patching.max_patch_length,
        "monotonicity": patching.rule == "monotonic",
        "patch_size": 4.5
        if (patching.rule, patching.patch_size) == ("entropy", 4)
        else patching.patch_size,
        "patching_batch_size": 1,
        "patching_mode": mode,
        "threshold": patching.threshold,
        "threshold_add": patching.threshold_add if patching.rule == "global_monotonic" else None,
    }


def notes(patching: PatchingConfig) -> tuple[str, ...]:
    """Returns notes on patches that Meta's code finds elsewhere (differences.md)."""
    found = []
    if patching.rule == "global_monotonic" and not patching.published_skip_at_3:
        found.append(
            "Meta's code never starts a patch at position 3 under threshold_add, bltjax may"
        )
    if patching.turns:
        found.append(
            "patching.turns=True: Meta's code starts no patch at turns, and its format cannot say "
            "it: bltjax reads these weights without it too"
        )
    return tuple(found)


def write_entropy_model(config: EntropyModelConfig, lengths: Lengths, problems: list[str]) -> dict:
    """Writes LMTransformerArgs; see `write_blt`."""
    problems += [f"{setting}: Meta's code has no such setting" for setting in unpublished(config)]
    stacks = _plain_stacks({"transformer": config.transformer}, problems)
    return {
        **_IGNORED,
        **write_pairs(dataclasses.replace(config, **stacks), _ENTROPY_MODEL, problems),
        "attn_bias_type": "local_block_causal",
        "eos_id": EOS_ID,
        "max_seqlen": lengths.entropy_bytes,
    }


def _plain_stacks(
    stacks: dict[str, TransformerConfig], problems: list[str]
) -> dict[str, TransformerConfig]:
    """Returns equivalent stacks with equal fields where possible, since the format shares them."""
    multiplier, multiple_of = common_widths(stacks, problems)
    grouped = any(s.kv_heads != s.num_heads for name, s in stacks.items() if "global" not in name)
    return {
        name: dataclasses.replace(
            s,
            num_kv_heads=s.kv_heads
            if (grouped if "global" not in name else s.kv_heads != s.num_heads)
            else None,
            head_dim=None if s.head_width * s.num_heads == s.dim else s.head_width,
            ffn_dim_multiplier=multiplier,
            ffn_multiple_of=multiple_of,
            ffn_width=None,
        )
        for name, s in stacks.items()
    }
