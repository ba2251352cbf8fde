"""Cross-attention between bytes and patches (model.md#cross-attention).

A softmax over the bytes of one patch (encoder) or over the vectors of one patch (decoder), never a
masked [P*K, L] product. Softmaxes are in float32. Features of all heads stay side by side (see
`ops/heads.py`), and the K vectors of a patch too: a byte takes one row.

Letters: B rows, L bytes, P patches, K vectors per patch, H heads, D head width.
"""

import functools

import jax
import jax.numpy as jnp

from bltjax.ops import partial_softmax
from bltjax.ops.heads import spread_heads, sum_heads, weigh_heads
from bltjax.ops.partial_softmax import MASKED
from bltjax.ops.pooling import segment_max, segment_sum, take_patches, take_vectors
from bltjax.ops.slots import on_shards


def patches_from_bytes_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, patch_ids: jax.Array, window: int | None = None
) -> jax.Array:
    """Attends from the K queries of each patch to the patch's bytes (model.md#cross-attention).

    With a window w, patch j sees the bytes of patches j-w+1 .. j. A query with nothing to see
    gives 0. Shapes: q [B, P, K, H, D]; k, v [B, L, H, D]; patch_ids int32 [B, L], sorted
    -> [B, P, K, H, D]. Cost O(L * w), a softmax per patch for each of w shifts.
    """
    return on_shards(functools.partial(_patches_from_bytes, window), q, k, v, patch_ids)


def bytes_from_patches_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, patch_ids: jax.Array, window: int | None = None
) -> jax.Array:
    """Attends from each byte to the K vectors of one patch (model.md#cross-attention).

    With a window w, a byte of patch j sees patches j-w+1 .. j; patches before the first are
    invisible, and a byte with nothing to see gives 0. Shapes: q [B, L, H, D];
    k, v [B, P, K, H, D]; patch_ids int32 [B, L] (-1: none) -> [B, L, H, D]. Cost O(L * w).
    """
    return on_shards(functools.partial(_bytes_from_patches, window), q, k, v, patch_ids)


def _patches_from_bytes(window, q, k, v, patch_ids):
    _, num_patches, num_vectors, num_heads, width = q.shape
    queries, keys, values = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    exact, scale = q.dtype == jnp.float32, width**-0.5

    def part(offset):
        ids = patch_ids + offset
        taken = jnp.split(take_patches(queries, ids), num_vectors, axis=-1)
        scores = [sum_heads(query.astype(jnp.float32) * keys, num_heads, exact) for query in taken]
        scores = jnp.concatenate(scores, axis=-1) * scale
        # Bytes shifted past the last patch would overflow against another patch's maximum.
        scores = jnp.where((ids < num_patches)[:, :, None], scores, MASKED)
        top = jnp.maximum(jax.lax.stop_gradient(segment_max(scores, ids, num_patches)), MASKED)
        weights = jnp.exp(scores - take_patches(top, ids))
        total = segment_sum(weights, ids, num_patches)
        each = jnp.split(weights, num_vectors, axis=-1)
        mixed = [weigh_heads(weight, values, width, exact) for weight in each]
        return top, total, segment_sum(jnp.concatenate(mixed, axis=-1), ids, num_patches)

    return _softmax_over_parts(part, window, width, exact).astype(v.dtype).reshape(q.shape)


def _bytes_from_patches(window, q, k, v, patch_ids):
    num_vectors, num_heads, width = k.shape[2:]
    queries = q.reshape(*q.shape[:2], -1).astype(jnp.float32)
    k, v = (x.reshape(*x.shape[:2], -1) for x in (k, v))
    exact, scale = q.dtype == jnp.float32, width**-0.5

    def seen(offset):
        ids = patch_ids - offset
        visible = (ids >= 0)[:, :, None]
        keys, values = (take_vectors(x, ids, num_vectors) for x in (k, v))
        products = (queries * key.astype(jnp.float32) for key in keys)
        scores = [sum_heads(product, num_heads, exact) * scale for product in products]
        scores = [jnp.where(visible, score, MASKED) for score in scores]
        top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, scores))
        weights = [jnp.where(visible, jnp.exp(score - top), 0) for score in scores]
        return top, weights, values

    def mixed(weights, values):
        both = zip(weights, values, strict=True)
        return sum(weigh_heads(weight, value, width, exact) for weight, value in both)

    def part(offset):
        top, weights, values = seen(offset)
        return top, sum(weights), mixed(weights, values)

    if window is None or window == 1:  # then weights are divided, rather than all features
        _, weights, values = seen(0)
        total = sum(weights)
        total = jnp.where(total > 0, total, 1)
        out = mixed([weight / total for weight in weights], values)
    else:
        out = _softmax_over_parts(part, window, width, exact)
    return out.astype(v.dtype).reshape(q.shape)


def _softmax_over_parts(part, window, width, exact):
    """Merges `window` partial softmaxes; part(i): the sums over what lies i patches back.

    The sums are those of `partial_softmax`, with weighted values as [..., H*D].
    """
    top, total, mixed = part(0)
    if window is None or window == 1:
        return mixed * spread_heads(1 / jnp.where(total > 0, total, 1), width, exact)

    def by_head(sums):
        *rest, mixed = sums
        return *rest, mixed.reshape(*mixed.shape[:-1], -1, width)

    def step(sums, i):
        return partial_softmax.merge(sums, by_head(part(i))), None

    sums = by_head((top, total, mixed))
    sums, _ = jax.lax.scan(jax.checkpoint(step), sums, jnp.arange(1, window))
    return partial_softmax.mean(sums).reshape(mixed.shape)
