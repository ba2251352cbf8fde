"""Attention: causal over patches, windowed over bytes, and between bytes and patches.

Nothing here is quadratic in the number of bytes. Byte stacks look back a fixed window and go
block by block; cross-attention is a softmax over the bytes of one patch (encoder) or over the
vectors of one patch (decoder), never a masked [P*K, L] product. Softmaxes are in float32.

Letters: B rows, L bytes, P patches, K vectors per patch, H heads, G key/value heads, D head width.
"""

import jax
import jax.numpy as jnp

from bltjax.ops.kernels.splash_attention import splash_attention
from bltjax.ops.kernels.tiled_attention import tiled_attention
from bltjax.ops.pooling import segment_max, segment_sum, take_patches

_MASKED = -1e30  # finite, so that two fully masked parts can be merged without NaN


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Each position sees itself and earlier ones of its segment (spec 5.9).

    Shapes: q [B, P, H, D]; k, v [B, P, G, D] with G dividing H; segments int32 [B, P]
    -> [B, P, H, D].
    """
    return _self_attention(q, k, v, segments)


def window_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: int
) -> jax.Array:
    """Each position sees the last `window` ones of its segment, itself included (spec 5.9).

    Cost is linear in L. Shapes as in `causal_attention`, with L for P.
    """
    return _self_attention(q, k, v, segments, window)


def _self_attention(q, k, v, segments, window=None):
    """By kernels on TPUs, elsewhere in tiles, whose sizes are those that suit CPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device  # None: a mesh of shapes alone
    if device is not None and device.platform == "tpu":
        return splash_attention(q, k, v, segments, window)
    return tiled_attention(q, k, v, segments, window)


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
