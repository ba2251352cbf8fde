"""The golden files: numbers computed by the published PyTorch code on tiny random weights.

Here the published names and config fields meet ours: a checkpoint `layers.{i}.` becomes a stacked
leading axis, and nothing is transposed.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    HashConfig,
    InitConfig,
    TransformerConfig,
)

GOLDEN = Path(__file__).parent / "golden_data" / "golden"
MODELS = (
    "meta_A_1b_like",
    "meta_B_7b_like",
    "meta_C_windows_alllayers",
    "meta_D_no_cross_attn_maxpool",
)


def arrays(name: str) -> dict:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {key: data[key] for key in data.files}


def params(name: str) -> dict:
    return nest(load_file(GOLDEN / f"{name}.safetensors"))


def nest(tensors: dict) -> dict:
    """Flat published names -> nested dict with stacked layers and stacked hash tables."""
    groups = {}
    for name, tensor in tensors.items():
        match = re.search(r"\.(\d+)\.|^layers\.(\d+)\.", name)
        index = int(match[1] or match[2]) if match else None
        path = re.sub(r"(^|\.)\d+(?=\.)", "", name)
        groups.setdefault(path, {})[index] = tensor
    tree = {}
    for path, found in groups.items():
        value = found[None] if None in found else np.stack([found[i] for i in range(len(found))])
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def blt_config(name: str) -> BLTConfig:
    c = json.loads((GOLDEN / f"{name}.config.json").read_text())

    def stack(kind, window, kv):
        return TransformerConfig(
            dim=c[f"dim_{kind}"],
            num_layers=c[f"n_layers_{kind}"],
            num_heads=c[f"n_heads_{kind}"],
            num_kv_heads=c[kv],
            window=window,
            rope_theta=c["rope_theta"],
            norm_eps=c["norm_eps"],
            ffn_dim_multiplier=c["ffn_dim_multiplier"],
            ffn_multiple_of=c["multiple_of"],
        )

    window = c["local_attention_window_len"]
    return BLTConfig(
        local_encoder=stack("local_encoder", window, "n_kv_heads"),
        global_transformer=stack("global", None, "n_kv_heads_global"),
        local_decoder=stack("local_decoder", window, "n_kv_heads"),
        cross_attention=CrossAttentionConfig(
            encoder=c["cross_attn_encoder"],
            decoder=c["cross_attn_decoder"],
            k=c["cross_attn_k"] or 1,
            num_heads=c["cross_attn_nheads"] or 1,
            all_layers_encoder=c["cross_attn_all_layers_encoder"],
            all_layers_decoder=c["cross_attn_all_layers_decoder"],
            window_encoder=c["cross_attn_window_encoder"],
            window_decoder=c["cross_attn_window_decoder"],
        ),
        hash=HashConfig(
            sizes=tuple(c["encoder_hash_byte_group_size"]),
            vocab=c["encoder_hash_byte_group_vocab"],
            num_functions=c["encoder_hash_byte_group_nb_functions"],
        ),
        pooling=c["downsampling_by_pooling"],
        vocab_size=c["vocab_size"],
        init=InitConfig(c["init_std_factor"], c["init_base_std"]),
    )


def entropy_config(name: str = "meta_entropy") -> EntropyModelConfig:
    c = json.loads((GOLDEN / f"{name}.config.json").read_text())
    return EntropyModelConfig(
        transformer=TransformerConfig(
            dim=c["dim"],
            num_layers=c["n_layers"],
            num_heads=c["n_heads"],
            num_kv_heads=c["n_kv_heads"],
            window=c["sliding_window"],
            rope_theta=c["rope_theta"],
            norm_eps=c["norm_eps"],
            ffn_dim_multiplier=c["ffn_dim_multiplier"],
            ffn_multiple_of=c["multiple_of"],
        ),
        vocab_size=c["vocab_size"],
    )
