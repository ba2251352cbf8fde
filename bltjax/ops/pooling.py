"""Reductions of bytes over the patches that hold them, and patches spread over their bytes.

`ids` [B, L] names the patch of each byte and never decreases along a row. The batch is a vmap, or
the rows of one device, so that rows may be sharded. All sums, those of gradients too, are float32.
"""

import functools

import jax
import jax.numpy as jnp

from bltjax.ops import platform
from bltjax.ops.heads import rows_in_memory
from bltjax.ops.sorted_sums import scatter_sums, sorted_sums


def segment_sum(x: jax.Array, ids: jax.Array, num_patches: int) -> jax.Array:
    """Sums x [B, L, ...] over the bytes of each patch -> [B, P, ...]; 0 where there are none.

    Leaves out bytes whose id lies outside 0..P-1. Sums are rounded once, to x's dtype.
    """
    return _segment_sum(num_patches, x, ids)


def segment_max(x: jax.Array, ids: jax.Array, num_patches: int) -> jax.Array:
    """Returns the maximum of x [B, L, ...] over the bytes of each patch -> [B, P, ...].

    -inf without bytes; leaves out ids outside 0..P-1. Equal maxima share the gradient evenly, as
    published (model.md#pooling).
    """
    return _segment_max(num_patches, x, ids)


def take_patches(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Takes row ids[b, t] of x [B, P, ...] for each byte -> [B, L, ...]; clips ids outside."""
    return _take_patches(x.shape[1], x, ids)


def take_vectors(x: jax.Array, ids: jax.Array, num_vectors: int) -> list[jax.Array]:
    """Takes the vectors side by side in row ids[b, t] of x [B, P, K*F], K arrays [B, L, F].

    As `take_patches` and a split, but on TPUs gradients are joined once they are sums of patches:
    joined for each byte, they would take longer than the sums.
    """
    return _take_vectors(x.shape[1], num_vectors, x, ids)


def pool_patches(h: jax.Array, ids: jax.Array, num_patches: int, mode: str) -> jax.Array:
    """Pools byte states h [B, L, E] into a vector for each patch [B, P, E]; 0 for empty patches.

    mode: "max", "min" or "mean" (model.md#pooling).
    """
    if mode == "mean":
        h32 = h.astype(jnp.float32)  # half precision cannot count to 257
        count = segment_sum(jnp.ones_like(h32[..., :1]), ids, num_patches)
        return (segment_sum(h32, ids, num_patches) / jnp.maximum(count, 1)).astype(h.dtype)
    sign = -1 if mode == "min" else 1
    extreme = segment_max(sign * h, ids, num_patches)
    return jnp.where(jnp.isneginf(extreme), 0, sign * extreme)


def _sums(x, ids, num_patches):
    """Sums x [B, L, ...] over each patch -> float32 [B, P, ...].

    On CPUs a scatter is 1.4 to 10 times as fast as products (two cores, rows of 1,024 to 8,192
    bytes, 2026-11). On GPUs it would be atomic additions, in any order.
    """
    sums = scatter_sums if platform.platform() == "cpu" else sorted_sums
    return sums(x, ids, num_patches)


def _take(x, ids, **outside):
    options = outside | dict(wrap_negative_indices=False)
    return jax.vmap(lambda row, i: row.at[i].get(**options))(x, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _segment_sum(num_patches, x, ids):
    return _sums(x, ids, num_patches).astype(x.dtype)


def _segment_sum_backward(num_patches, ids, gradient):
    return _take(gradient, ids, mode="fill", fill_value=0), None


_segment_sum.defvjp(lambda n, x, ids: (_segment_sum(n, x, ids), ids), _segment_sum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _segment_max(num_patches, x, ids):
    def of_row(x, ids):
        # A slice of x, spread, rather than a fresh array: it keeps x's sharding (of heads, say).
        empty = jnp.broadcast_to(jnp.full_like(x[:1], -jnp.inf), (num_patches, *x.shape[1:]))
        options = dict(indices_are_sorted=True, mode="drop", wrap_negative_indices=False)
        return empty.at[ids].max(x, **options)

    return jax.vmap(of_row)(x, ids)


def _segment_max_forward(num_patches, x, ids):
    top = _segment_max(num_patches, x, ids)
    return top, (x, ids, top)


def _segment_max_backward(num_patches, saved, gradient):
    x, ids, top = saved
    is_top = x == _take(top, ids, mode="fill", fill_value=jnp.nan)
    ties = _sums(is_top.astype(x.dtype), ids, num_patches)
    share = (gradient / jnp.maximum(ties, 1)).astype(x.dtype)
    return jnp.where(is_top, _take(share, ids, mode="fill", fill_value=0), 0), None


_segment_max.defvjp(_segment_max_forward, _segment_max_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take_patches(num_patches, x, ids):
    return _take(x, ids, mode="clip")


def _take_patches_backward(num_patches, ids, gradient):
    ids = jnp.clip(ids, 0, num_patches - 1)
    return _sums(gradient, ids, num_patches).astype(gradient.dtype), None


_take_patches.defvjp(lambda n, x, ids: (_take_patches(n, x, ids), ids), _take_patches_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take_vectors(num_patches, num_vectors, x, ids):
    taken = rows_in_memory(_take(x, ids, mode="clip"))
    return jnp.split(taken, num_vectors, axis=-1)


def _take_vectors_backward(num_patches, num_vectors, ids, gradients):
    ids = jnp.clip(ids, 0, num_patches - 1)
    if platform.platform() != "tpu":
        gradients = [jnp.concatenate(gradients, axis=-1)]
    sums = [_sums(rows_in_memory(g), ids, num_patches) for g in gradients]
    return jnp.concatenate(sums, axis=-1).astype(gradients[0].dtype), None


_take_vectors.defvjp(lambda *inputs: (_take_vectors(*inputs), inputs[-1]), _take_vectors_backward)
