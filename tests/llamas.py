"""Tiny tokenized models in Hugging Face's format, made without PyTorch."""

import json

import numpy as np

from bltjax.checkpoints.pytorch.safetensors_files import write_safetensors

SETTINGS = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    vocab_size=48,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position_embeddings=64,
    hidden_act="silu",
    tie_word_embeddings=False,
    torch_dtype="float32",
)


def settings(kind="llama", **changes):
    """Content of a config.json."""
    found = dict(model_type=kind, architectures=["ForCausalLM"], **SETTINGS)
    if kind == "qwen3":
        found["head_dim"] = 8
    if kind == "mistral":
        found["sliding_window"] = None
    return found | changes


def tensors(config, seed=0):
    """Random float32 tensors of a config, by name."""
    rng = np.random.default_rng(seed)
    dim, kind = config["hidden_size"], config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or dim // heads
    ffn, vocab = config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        outs = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}
        for name, out in outs.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (out, dim)
            if kind == "qwen2":
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (out,)
            if kind == "qwen3" and name != "v":
                shapes[f"{layer}self_attn.{name}_norm.weight"] = (width,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (dim, heads * width)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (ffn, dim)
        shapes[f"{layer}mlp.down_proj.weight"] = (dim, ffn)
        shapes[f"{layer}input_layernorm.weight"] = (dim,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (dim,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, dim)
    found = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    found = {n: x + 1 if "norm" in n and x.ndim == 1 else x for n, x in found.items()}
    found["model.embed_tokens.weight"] *= 0.1
    return {name: x.astype(np.float32) for name, x in found.items()}


def write(directory, kind="llama", change=None, wrong=None, **changes):
    """Write a directory of these settings; returns it.

    change(tensors) edits the tensors. wrong: settings that config.json has and the tensors do not
    follow; `...` removes one.
    """
    directory.mkdir(parents=True)
    config = settings(kind, **changes)
    found = tensors(config)
    if change:
        change(found)
    write_safetensors(directory / "model.safetensors", found)
    told = {key: value for key, value in (config | (wrong or {})).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(told))
    return directory
