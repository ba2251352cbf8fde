"""Parameters laid out for generation, and the layers that compute with them.

Each layer is on its own: a loop would copy the layer that it needs out of a stack. Matrices of the
same input are one, so that a step has fewer products, and are in the compute dtype and whole over
fsdp already. The rows of wq and wk are in the order in which rotary embedding turns
halves of a head instead of pairs: both have it, so their scores are the same.

Matrices lie [..., in] as published, and on CPUs [in, ...], where a product with few rows is faster
so. Measured on 2 cores, 96 bytes a row after prompts of 64, `small` of benchmarks/generate.py,
against stacked layers, in turns, median of 5: 2.1 times as fast with 1 row and 1.5 times with 8, of
which the transposed matrices give 1.09 and 1.19.

Letters: B rows, L positions, E width, H query heads, G key/value heads, D head width, F hidden
units of the feed-forward layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig, TransformerConfig
from bltjax.model.parameters import add_bias
from bltjax.model.transformer import each_layer
from bltjax.ops import platform
from bltjax.ops.norm import rms_norm
from bltjax.ops.swiglu import swiglu

_MATRICES = {
    "hash_projection",
    "output",
    "patch_embedding_projection",
    "skip_projection",
    "token_embedding_projection",
}


class Block(NamedTuple):
    """A layer of a transformer; H = G R. Shapes of matrices are those off CPUs."""

    attention_norm: jax.Array  # float32 [E]
    wqkv: jax.Array  # [G, R + 2, D, E]  the queries of each key/value head, its key, its value
    wo: jax.Array  # [E, H D]
    ffn_norm: jax.Array  # float32 [E]
    w13: jax.Array  # [2, F, E]
    w2: jax.Array  # [E, F]
    bqkv: jax.Array | None = None  # float32 [G, R + 2, D]  biases of wqkv
    qk_norm: jax.Array | None = None  # float32 [R + 1, D]  of queries and of the key


class CrossLayer(NamedTuple):
    """A layer of cross-attention. Shapes of matrices are those off CPUs."""

    norm_q: jax.Array  # float32 [E]
    norm_kv: jax.Array  # float32 [E]
    wq: jax.Array  # [H, D, E]
    wkv: jax.Array  # [2, G, D, E]
    wo: jax.Array  # [E, H D]


def prepare(config: BLTConfig | EntropyModelConfig, params: dict, whole: bool = True) -> dict:
    """Returns the parameters of a model laid out for generation; those that are, as they are.

    whole: whether matrices are whole over fsdp; else each product gathers its own.
    """
    params, dtype = jax.tree.map(jnp.asarray, params), jnp.dtype(config.compute_dtype)
    if not isinstance(config, BLTConfig):
        return _prepare_part(config.transformer, None, params, dtype, whole)
    cross = config.cross_attention
    parts = dict(
        local_encoder=(config.local_encoder, cross.encoder_heads),
        global_transformer=(config.global_transformer, None),
        local_decoder=(config.local_decoder, cross.decoder_heads),
    )
    return params | {
        name: _prepare_part(*settings, params[name], dtype, whole)
        for name, settings in parts.items()
    }


def _prepare_part(stack: TransformerConfig, cross_heads, params: dict, dtype, whole) -> dict:
    if isinstance(params["layers"], tuple):
        return params

    def matrix(tree, *axes):
        """Returns a weight [out, in] with these logical axes."""
        axes = (None if whole and axis == "embed" else axis for axis in axes)
        return reshard(tree["weight"].astype(dtype), sharding.spec(*axes))

    found = dict(params)
    found["layers"] = tuple(_block(stack, x, matrix) for x in each_layer(params["layers"]))
    if "cross_attn_layers" in params:
        layers = each_layer(params["cross_attn_layers"])
        found["cross_attn_layers"] = tuple(_cross_layer(cross_heads, x, matrix) for x in layers)
    others = _MATRICES & params.keys()
    return found | {name: _lie(matrix(params[name], None, "embed")) for name in others}


def _block(stack: TransformerConfig, layer: dict, matrix) -> Block:
    attention, ffn = layer["attention"], layer["feed_forward"]
    q, k, v = (matrix(attention[name], "heads", "embed") for name in ("wq", "wk", "wv"))
    q, k, v = (_split_rows(w, stack.kv_heads, stack.head_width) for w in (q, k, v))
    return Block(
        layer["attention_norm"]["weight"],
        _lie(jnp.concatenate([_pairs_to_halves(q), _pairs_to_halves(k), v], axis=1)),
        _lie(matrix(attention["wo"], "embed", "heads")),
        layer["ffn_norm"]["weight"],
        _lie(jnp.stack([matrix(ffn[name], "ffn", "embed") for name in ("w1", "w3")])),
        _lie(matrix(ffn["w2"], "embed", "ffn")),
        _biases(stack, attention) if stack.qkv_bias else None,
        _norms_of_heads(stack, attention) if stack.qk_norm else None,
    )


def _biases(stack: TransformerConfig, attention: dict):
    columns = (attention[name]["bias"][:, None] for name in ("wq", "wk", "wv"))
    q, k, v = (_split_rows(b, stack.kv_heads, stack.head_width) for b in columns)
    joined = jnp.concatenate([_pairs_to_halves(q), _pairs_to_halves(k), v], axis=1)
    return joined[..., 0].astype(jnp.float32)


def _norms_of_heads(stack: TransformerConfig, attention: dict):
    q, k = (attention[name]["weight"].astype(jnp.float32)[None] for name in ("q_norm", "k_norm"))
    q = jnp.broadcast_to(q, (stack.num_heads // stack.kv_heads, stack.head_width))
    both = jnp.concatenate([q, k])
    return jnp.concatenate([both[:, 0::2], both[:, 1::2]], axis=1)


def _cross_layer(heads, layer: dict, matrix) -> CrossLayer:
    width = len(layer["wq"]["weight"]) // heads[0]
    q, k, v = (
        _split_rows(matrix(layer[name], "heads", "embed"), number, width)[:, 0]
        for name, number in (("wq", heads[0]), ("wk", heads[1]), ("wv", heads[1]))
    )
    return CrossLayer(
        layer["cross_attn_norm_q"]["weight"],
        layer["cross_attn_norm_kv"]["weight"],
        _lie(q),
        _lie(jnp.stack([k, v])),
        _lie(matrix(layer["wo"], "embed", "heads")),
    )


def _split_rows(w, groups: int, width: int):
    """Splits the rows of a matrix by groups of heads: [out, E] -> [G, out / (G D), D, E]."""
    out, in_ = jax.typeof(w).sharding.spec
    shape = groups, w.shape[0] // (groups * width), width, w.shape[1]
    return jax.lax.reshape(w, shape, out_sharding=jax.P(out, None, None, in_))


def _pairs_to_halves(w):
    """Puts the rows (2i, 2i+1) of each head of [G, N, D, E] into rows i of its two halves."""
    return jnp.concatenate([w[:, :, 0::2], w[:, :, 1::2]], axis=2)


def _lie(w):
    """Returns a matrix [..., in] as it lies: on CPUs [in, ...]."""
    return jnp.moveaxis(w, -1, 0) if platform.platform() == "cpu" else w


def project(x, w):
    """Maps x [B, L, in] -> [B, L, ...] by a prepared matrix."""
    w = sharding.gather_weight(w.astype(x.dtype))
    letters, axes = "opqr"[: w.ndim - 1], jax.typeof(w).sharding.spec
    if platform.platform() == "cpu":
        subscripts, axes = f"i{letters}", axes[1:]
    else:
        subscripts, axes = f"{letters}i", axes[:-1]
    batch = sharding.batch_spec(1)[0]
    return jnp.einsum(
        f"bli,{subscripts}->bl{letters}", x, w, out_sharding=jax.P(batch, None, *axes)
    )


def norm(x, weight, eps: float):
    """Normalises x [B, L, E] as `rms_norm` does."""
    if platform.platform() == "gpu" and x.shape[0] * x.shape[1] == 1:
        # XLA makes one kernel of the sum and what it scales where there are two rows or more.
        twice = jax.lax.optimization_barrier(jnp.broadcast_to(x, (2, *x.shape[1:])))
        return rms_norm(twice, weight, eps)[:1]
    return rms_norm(x, weight, eps)


def run_block(block: Block, stack: TransformerConfig, x, factors, attend):
    """Applies attention and the feed-forward layer to x [B, L, E], each with its residual.

    attend(q, k, v): q [B, L, H, D]; k, v [B, L, G, D] -> [B, L, H, D].
    """
    qkv = project(norm(x, block.attention_norm, stack.norm_eps), block.wqkv)
    if block.bqkv is not None:
        qkv = add_bias(qkv, block.bqkv)
    turned = qkv[:, :, :, :-1]
    if block.qk_norm is not None:
        turned = _norm_heads(turned, block.qk_norm, stack.norm_eps)
    turned = _rotate(turned, factors)
    q, k, v = _merge(turned[:, :, :, :-1], 2), turned[:, :, :, -1], qkv[:, :, :, -1]
    x = x + project(_merge(attend(q, k, v), 2), block.wo)
    hidden = project(norm(x, block.ffn_norm, stack.norm_eps), block.w13)
    return x + project(swiglu(hidden[:, :, 0], hidden[:, :, 1]), block.w2)


def cross_keys_values(layer: CrossLayer, kv, eps: float):
    """Projects kv [B, L, E] -> keys, values [B, L, G, D], which `cross_read` may attend to."""
    both = project(norm(kv, layer.norm_kv, eps), layer.wkv)
    return both[:, :, 0], both[:, :, 1]


def cross_read(layer: CrossLayer, x, eps: float, attend):
    """Attends from x [B, L, E] -> [B, L, E]; attend: queries [B, L, H, D] -> [B, L, H, D]."""
    q = project(norm(x, layer.norm_q, eps), layer.wq)
    return project(_merge(attend(q), 2), layer.wo)


def _norm_heads(x, weights, eps: float):
    """Normalises the heads of x [B, L, G, N, D], each row of N by its own of weights [N, D]."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * jnp.expand_dims(weights, (0, 1, 2))).astype(x.dtype)


def _rotate(x, factors):
    """Turns (i, i + D / 2) of x [B, L, G, N, D] by factors [B, L, D / 2], in float32."""
    cos, sin = (f[:, :, None, None] for f in factors)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def _merge(x, axis: int):
    """Joins an axis, which may be sharded, with the next."""
    shape = *x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]
    axes = jax.typeof(x).sharding.spec
    spec = jax.P(*axes[: axis + 1], *axes[axis + 2 :])
    return jax.lax.reshape(x, shape, out_sharding=spec)
