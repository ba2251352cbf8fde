"""Attention of rows of blocks to their block, and to known positions before it (model.md#blocks).

A row of a block sees all rows of its block, in both directions, and what the position before the
block sees: that position and `window` - 1 before it, in its segment. Softmaxes are in float32.

Positions are cut into S equal tiles, and each has M blocks: so that the positions that the blocks
of a tile see lie together, and cost follows the number of blocks times the window.

Letters: B rows, L positions, S tiles, M blocks of a tile, K rows of a block, N = S M K, H query
heads, G key/value heads, R = H / G, D head width, T positions that a tile may see.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bltjax.ops import partial_softmax
from bltjax.ops.slots import on_shards, read_row


def num_tiles(length: int, window: int) -> int:
    """Returns the number of tiles that suits rows of a length and a window."""
    return math.ceil(length / min(128, max(64, window // 4)))


def tile_length(length: int, tiles: int) -> int:
    """Returns the positions of a tile."""
    return math.ceil(length / tiles)


def block_attention(q, k, v, keys, values, starts, segments, window: int):
    """Attends from the rows of blocks, q [B, N, H, D] -> [B, N, H, D].

    k, v [B, N, G, D]: of the rows of blocks; keys, values [B, L, G, D]: of known positions;
    segments int32 [B, L]: of these. starts int32 [B, S, M]: the position at which each block
    starts, for those of tile s from s C + 1 to (s + 1) C, where C is the `tile_length`.
    """
    # Without the scores, which the backward pass computes again.
    attend = jax.checkpoint(functools.partial(_attend, window))
    out = on_shards(attend, q, k, v, keys, values, starts, segments)
    return checkpoint_name(out, "attention")


def _attend(window, q, k, v, keys, values, starts, segments):
    batch, tiles, blocks = starts.shape
    groups, width = k.shape[2:]
    size = tile_length(segments.shape[1], tiles)
    back = min(tiles - 1, math.ceil((window - 1) / size))  # tiles before its own that one may see

    def of_blocks(x):
        """Turns [B, N, G R, D] -> [B, S, G, R, M, K, D]."""
        x = x.reshape(batch, tiles, blocks, -1, groups, x.shape[2] // groups, width)
        return x.transpose(0, 1, 4, 5, 2, 3, 6)

    def seen_by_tile(x):
        """Cuts [B, L, ...] -> [B, S, T, ...], what each tile and those before it hold."""
        end = tiles * size - x.shape[1]
        x = jnp.pad(x, ((0, 0), (back * size, end), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(batch, back + tiles, size, *x.shape[2:])
        return jnp.concatenate([x[:, i : i + tiles] for i in range(back + 1)], axis=2)

    queries, (k, v) = of_blocks(q), (of_blocks(x)[:, :, :, 0] for x in (k, v))
    keys, values = (jnp.swapaxes(seen_by_tile(x), 2, 3) for x in (keys, values))
    positions = jnp.arange(tiles)[:, None] * size + jnp.arange((back + 1) * size)[None]
    positions = positions[None, :, None] - back * size  # [1, S, 1, T]
    before = starts[..., None] - positions
    visible = (before > 0) & (before <= window) & (positions >= 0)  # [B, S, M, T]
    visible &= seen_by_tile(segments)[:, :, None] == _segments_before(starts, segments)

    scale = width**-0.5
    own = _product("bsgrmkd,bsgmjd->bsgrmkj", queries, k) * scale
    sums = partial_softmax.empty(jnp.zeros_like(queries, jnp.float32))
    sums = partial_softmax.add(
        sums, own, lambda weights: _product("bsgrmkj,bsgmjd->bsgrmkd", weights, v)
    )
    known = _product("bsgrmkd,bsgtd->bsgrmkt", queries, keys) * scale
    sums = partial_softmax.add(
        sums,
        known,
        lambda weights: _product("bsgrmkt,bsgtd->bsgrmkd", weights, values),
        visible[:, :, None, None, :, None],
    )
    out = partial_softmax.mean(sums).transpose(0, 1, 4, 5, 2, 3, 6)
    return out.reshape(q.shape).astype(q.dtype)


def _segments_before(starts, segments):
    """Returns the segment of the position before each block [B, S, M, 1]."""
    return jax.vmap(lambda row, at: read_row(row[:, None], at))(segments, starts - 1)


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a.astype(b.dtype), b, preferred_element_type=jnp.float32)
