"""Cross-attention between bytes and patches (model.md#cross-attention).

A softmax over the bytes of one patch (encoder) or over the vectors of one patch (decoder), never a
masked [P*K, L] product. Softmaxes are in float32.

Letters: B rows, L bytes, P patches, K vectors per patch, H heads, D head width.
"""

import jax
import jax.numpy as jnp

from bltjax.ops import partial_softmax
from bltjax.ops.partial_softmax import MASKED
from bltjax.ops.pooling import segment_max, segment_sum, take_patches


def patches_from_bytes_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, patch_ids: jax.Array, window: int | None = None
) -> jax.Array:
    """Attends from the K queries of each patch to the patch's bytes (model.md#cross-attention).

    With a window w, patch j sees the bytes of patches j-w+1 .. j. A query with nothing to see
    gives 0. Shapes: q [B, P, K, H, D]; k, v [B, L, H, D]; patch_ids int32 [B, L], sorted
    -> [B, P, K, H, D]. Cost O(L * w), a softmax per patch for each of w shifts.
    """
    num_patches, scale = q.shape[1], q.shape[-1] ** -0.5

    def part(offset):
        ids = patch_ids + offset
        queries = take_patches(q, ids)
        scores = jnp.einsum("blkhd,blhd->blkh", queries, k, preferred_element_type=jnp.float32)
        # Bytes shifted past the last patch would overflow against another patch's maximum.
        scores = jnp.where((ids < num_patches)[:, :, None, None], scores * scale, MASKED)
        top = jnp.maximum(jax.lax.stop_gradient(segment_max(scores, ids, num_patches)), MASKED)
        weights = jnp.exp(scores - take_patches(top, ids))
        total = segment_sum(weights, ids, num_patches)
        values = weights[..., None] * v[:, :, None].astype(jnp.float32)
        return top, total, segment_sum(values, ids, num_patches)

    return _softmax_over_parts(part, window).astype(v.dtype)


def bytes_from_patches_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, patch_ids: jax.Array, window: int | None = None
) -> jax.Array:
    """Attends from each byte to the K vectors of one patch (model.md#cross-attention).

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
        scores = jnp.where(visible, scores * scale, MASKED)
        top = jax.lax.stop_gradient(scores.max(axis=2))
        weights = jnp.exp(scores - top[:, :, None]) * visible.astype(scores.dtype)
        mixed = jnp.einsum("blkh,blkhd->blhd", weights, value.astype(jnp.float32))
        return top, weights.sum(axis=2), mixed

    return _softmax_over_parts(part, window).astype(v.dtype)


def _softmax_over_parts(part, window):
    """Merges `window` partial softmaxes; part(i): the sums over what lies i patches back."""
    sums = part(0)
    if window is not None and window > 1:
        step = jax.checkpoint(lambda sums, i: (partial_softmax.merge(sums, part(i)), None))
        sums, _ = jax.lax.scan(step, sums, jnp.arange(1, window))
    return partial_softmax.mean(sums)
