"""Reductions of bytes over the patches that hold them.

`ids` [B, L] names the patch of each byte and never decreases along a row. Bytes whose id lies
outside 0..P-1 are left out. The batch is a vmap, so that rows may be sharded.
"""

import jax
import jax.numpy as jnp


def segment_sum(x: jax.Array, ids: jax.Array, num_patches: int) -> jax.Array:
    """Sums x [B, L, ...] over the bytes of each patch -> [B, P, ...]; 0 where there are none."""
    return _reduce(x, ids, num_patches, "add", 0)


def segment_max(x: jax.Array, ids: jax.Array, num_patches: int) -> jax.Array:
    """Returns the maximum of x [B, L, ...] over the bytes of each patch -> [B, P, ...].

    -inf without bytes. Equal maxima share the gradient evenly, as published (model.md#pooling).
    """
    return _reduce(x, ids, num_patches, "max", -jnp.inf)


def take_patches(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Takes row ids[b, t] of x [B, P, ...] for each byte -> [B, L, ...]; clips ids outside."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="clip", wrap_negative_indices=False))(x, ids)


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


def _reduce(x, ids, num_patches, operation, start):
    def reduce_row(x, ids):
        # A slice of x, spread, rather than a fresh array: it keeps x's sharding (of heads, say).
        empty = jnp.broadcast_to(jnp.full_like(x[:1], start), (num_patches, *x.shape[1:]))
        reduce = getattr(empty.at[ids], operation)
        return reduce(x, indices_are_sorted=True, mode="drop", wrap_negative_indices=False)

    return jax.vmap(reduce_row)(x, ids)
