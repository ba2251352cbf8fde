"""Attention: causal over patches, windowed over bytes, and between bytes and patches.

Nothing here is quadratic in the number of bytes. Byte stacks look back a fixed window and go
block by block; cross-attention is a softmax over the bytes of one patch (encoder) or over the
vectors of one patch (decoder), never a masked [P*K, L] product. Softmaxes are in float32.

Letters: B rows, L bytes, P patches, K vectors per patch, H heads, G key/value heads, D head width.
"""

import jax
import jax.numpy as jnp
from jax.nn import dot_product_attention

from bltjax.ops.pooling import segment_max, segment_sum, take_patches

_MASKED = -1e30  # finite, so that two fully masked parts can be merged without NaN


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Each position sees itself and earlier ones of its segment (spec 5.9).

    Shapes: q [B, P, H, D]; k, v [B, P, G, D] with G dividing H; segments int32 [B, P]
    -> [B, P, H, D].
    """
    positions = jnp.arange(q.shape[1])
    mask = (positions[:, None] >= positions[None, :])[None] & _same(segments, segments)
    return dot_product_attention(q, k, v, mask=mask[:, None])


def window_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: int
) -> jax.Array:
    """Each position sees the last `window` ones of its segment, itself included (spec 5.9).

    Blocks of `window` queries attend to their own block and the one before, so cost and memory
    are linear in L. Shapes as in `causal_attention`, with L for P.
    """
    length = q.shape[1]
    if length <= window:
        return causal_attention(q, k, v, segments)
    padding = -length % window
    q, k, v = (
        _blocks(jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))), window) for x in (q, k, v)
    )
    segments = _blocks(jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-1), window)
    query, key = jnp.arange(window)[:, None], jnp.arange(2 * window)[None, :]
    visible = (key > query) & (key <= query + window)  # key 0 is the block before's first

    def attend(before, block):
        (q, k, v, s), (k0, v0, s0) = block, before
        mask = visible[None] & _same(s, jnp.concatenate([s0, s], axis=1))
        out = dot_product_attention(
            q,
            jnp.concatenate([k0, k], axis=1),
            jnp.concatenate([v0, v], axis=1),
            mask=mask[:, None],
        )
        return (k, v, s), out

    first = (jnp.zeros_like(k[0]), jnp.zeros_like(v[0]), jnp.full_like(segments[0], -2))
    _, out = jax.lax.scan(jax.checkpoint(attend), first, (q, k, v, segments))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def patches_from_bytes_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, patch_ids: jax.Array, window: int | None = None
) -> jax.Array:
    """The K queries of each patch attend to the patch's bytes (spec 3.3, encoder).

    With a window w, patch j sees the bytes of patches j-w+1 .. j. A query with nothing to see
    gives 0. Shapes: q [B, P, K, H, D]; k, v [B, L, H, D]; patch_ids int32 [B, L], sorted
    -> [B, P, K, H, D]. Cost O(L * w), a softmax per patch for each of w shifts.
    """
    num_patches, scale = q.shape[1], q.shape[-1] ** -0.5

    def part(offset):
        ids = patch_ids + offset
        scores = (
            jnp.einsum(
                "blkhd,blhd->blkh", take_patches(q, ids), k, preferred_element_type=jnp.float32
            )
            * scale
        )
        # Bytes shifted past the last patch would overflow against another patch's maximum.
        scores = jnp.where((ids < num_patches)[:, :, None, None], scores, _MASKED)
        top = jnp.maximum(jax.lax.stop_gradient(segment_max(scores, ids, num_patches)), _MASKED)
        weights = jnp.exp(scores - take_patches(top, ids))
        total = segment_sum(weights, ids, num_patches)
        values = weights[..., None] * v[:, :, None].astype(jnp.float32)
        return top, total, segment_sum(values, ids, num_patches)

    return _softmax_over_parts(part, window).astype(v.dtype)


def bytes_from_patches_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, patch_ids: jax.Array, window: int | None = None
) -> jax.Array:
    """Each byte attends to the K vectors of one patch (spec 3.3, decoder).

    With a window w, a byte of patch j sees patches j-w+1 .. j; patches before the first are
    invisible, and a byte with nothing to see gives 0. Shapes: q [B, L, H, D];
    k, v [B, P, K, H, D]; patch_ids int32 [B, L] (-1: none) -> [B, L, H, D]. Cost O(L * w).
    """
    keys_values, scale = jnp.concatenate([k, v], axis=-1), q.shape[-1] ** -0.5

    def part(offset):
        ids = patch_ids - offset
        visible = (ids >= 0)[:, :, None, None]
        key, value = jnp.split(take_patches(keys_values, ids), 2, axis=-1)
        scores = jnp.einsum("blhd,blkhd->blkh", q, key, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, scores * scale, _MASKED)
        top = jax.lax.stop_gradient(scores.max(axis=2))
        weights = jnp.exp(scores - top[:, :, None]) * visible
        mixed = jnp.einsum("blkh,blkhd->blhd", weights, value.astype(jnp.float32))
        return top, weights.sum(axis=2), mixed

    return _softmax_over_parts(part, window).astype(v.dtype)


def _softmax_over_parts(part, window):
    """Softmax whose terms come in `window` parts of (maximum, sum, weighted values)."""

    def merge(left, right):
        (top_l, total_l, mixed_l), (top_r, total_r, mixed_r) = left, right
        top = jnp.maximum(top_l, top_r)
        keep_l, keep_r = jnp.exp(top_l - top), jnp.exp(top_r - top)
        return (
            top,
            total_l * keep_l + total_r * keep_r,
            mixed_l * keep_l[..., None] + mixed_r * keep_r[..., None],
        )

    result = part(0)
    if window is not None and window > 1:
        step = jax.checkpoint(lambda carry, offset: (merge(carry, part(offset)), None))
        result, _ = jax.lax.scan(step, result, jnp.arange(1, window))
    _, total, mixed = result
    return mixed / jnp.where(total > 0, total, 1)[..., None]


def _same(query_segments, key_segments):
    return query_segments[:, :, None] == key_segments[:, None, :]


def _blocks(x, size):
    """[B, n*size, ...] -> [n, B, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
