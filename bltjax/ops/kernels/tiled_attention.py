"""Causal and windowed attention in tiles, forward and backward, in plain XLA.

Scores exist for a few tiles of queries and of keys at a time, tiles that no query sees are left
out, and the backward pass computes scores again from the log of each softmax's sum
(FlashAttention-2, 2023). So memory is linear in the number of positions, and cost in the number of
visible pairs. Softmaxes and sums are in float32.

Letters: B rows, L positions, G key/value heads, R query heads of each, D head width; C positions of
a tile, S tiles of a group, which go together; N tiles of queries, M of keys.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bltjax.ops import partial_softmax
from bltjax.ops.partial_softmax import MASKED

_NO_SEGMENT = -(2**31)


class Tiling(NamedTuple):
    """Static sizes of the tiles that a row is cut into."""

    window: int | None
    length: int  # L
    tile: int  # C
    group: int  # S
    back: int  # tiles before its own that a query may see, where there is a window
    front: int  # empty tiles before the first key, so that all tiles can look back alike

    @property
    def num_tiles(self):  # N
        step = self.tile * self.group
        return -(-self.length // step) * self.group

    @property
    def rounds(self):
        """Number of products of S tiles of queries with S tiles of keys, for a whole row."""
        groups = range(self.num_tiles // self.group)
        return sum(int(stop) - int(start) for start, stop in (_seen(self, i) for i in groups))

    @property
    def pairs_of_a_round(self):
        return self.group * self.tile**2


def _tiling(q, window, tile):
    return choose_tiling(*jax.typeof(q).sharding.shard_shape(q.shape)[:3], window, tile)


def choose_tiling(batch, length, heads, window: int | None, tile: int | None = None) -> Tiling:
    """Chooses the tile sizes for the rows that one device holds."""
    if window is not None and window >= length:
        window = None  # fewer tiles
    # The fastest on CPUs; a tile that is wider than its window computes mostly what is masked.
    tile = tile or (256 if window is None else min(128, max(32, window // 2)))
    # Equal tiles, of a multiple of 8: little padding.
    tile = 8 * math.ceil(math.ceil(length / math.ceil(length / tile)) / 8)
    if window is None:
        return Tiling(None, length, tile, 1, 0, 0)
    # As many tiles at a time as keep all cores busy and still fit in their caches.
    group = max(1, min(16 // (batch * heads), length // tile))
    back = math.ceil((window - 1) / tile)
    return Tiling(window, length, tile, group, back, back if group > 1 else 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def tiled_attention(q, k, v, segments, window: int | None = None, tile: int | None = None):
    """Attends from each position to itself and `window` - 1 before it (None: all) in its segment.

    q [B, L, H, D]; k, v [B, L, G, D], G dividing H; segments int32 [B, L] -> [B, L, H, D].
    """
    return _forward(q, k, v, segments, window, tile)[0]


def _forward(q, k, v, segments, window, tile):
    tiling = _tiling(q, window, tile)
    keys, values, ids = _key_tiles(tiling, k), _key_tiles(tiling, v), _id_tiles(tiling, segments)
    keys = _turned(keys)

    def attend(_, tiles):
        index, q = tiles

        def add_keys(first, sums):
            def read(weights):
                return _product("sbgrck,sbgkd->sbgrcd", weights, _take(tiling, values, first))

            scores = _product("sbgrcd,sbgdk->sbgrck", q, _take(tiling, keys, first))
            visible = _visible(tiling, index, first, ids)[:, :, None, None]
            scores = jnp.where(visible, scores * q.shape[-1] ** -0.5, MASKED)
            return partial_softmax.add(sums, scores, read)

        start = partial_softmax.empty(jnp.zeros_like(q, jnp.float32))
        sums = jax.lax.fori_loop(*_seen(tiling, index), add_keys, start)
        top, total, _ = sums
        return None, (partial_softmax.mean(sums).astype(v.dtype), top + jnp.log(total))

    queries = _query_tiles(tiling, q, k.shape[2])
    _, (out, log_sums) = jax.lax.scan(attend, None, (jnp.arange(len(queries)), queries))
    out = checkpoint_name(_from_query_tiles(tiling, out, q), "attention")
    log_sums = checkpoint_name(log_sums, "attention")
    return out, (q, k, v, segments, out, log_sums)


def _backward(window, tile, saved, gradient):
    q, k, v, segments, out, log_sums = saved
    tiling = _tiling(q, window, tile)
    keys, values, ids = _key_tiles(tiling, k), _key_tiles(tiling, v), _id_tiles(tiling, segments)
    turned_keys = _turned(keys)
    # The term that the gradients of all scores of a softmax share.
    common = _product("blhd,blhd->blh", gradient, out)[..., None]

    def pull_back(sums, tiles):
        index, q, gradient, common, log_sums = tiles
        turned_q, turned_gradient = _turned(q), _turned(gradient)
        # In products R comes before a query's position, t, by name too: einsum sums in that order.

        def add_keys(first, sums):
            dq, dk, dv = sums
            k, v = _take(tiling, keys, first), _take(tiling, values, first)
            visible = jnp.swapaxes(_visible(tiling, index, first, ids), -1, -2)[:, :, None, :, None]
            scores = _product("sbgkd,sbgdrt->sbgkrt", k, turned_q) * q.shape[-1] ** -0.5
            weights = jnp.exp(jnp.where(visible, scores, MASKED) - log_sums)
            d_weights = _product("sbgkd,sbgdrt->sbgkrt", v, turned_gradient)
            d_scores = (weights * (d_weights - common) * q.shape[-1] ** -0.5).astype(q.dtype)
            turned_k = _take(tiling, turned_keys, first)
            dq = dq + _product("sbgdk,sbgkrt->sbgdrt", turned_k, d_scores)
            dk = _add(tiling, dk, first, _product("sbgkrt,sbgrtd->sbgkd", d_scores, q))
            dv = _add(tiling, dv, first, _product("sbgkrt,sbgrtd->sbgkd", weights, gradient))
            return dq, dk, dv

        start = jnp.zeros_like(turned_q, jnp.float32), *sums
        common, log_sums = jnp.squeeze(common, -1)[:, :, :, None], log_sums[:, :, :, None]
        dq, *sums = jax.lax.fori_loop(*_seen(tiling, index), add_keys, start)
        return tuple(sums), jnp.moveaxis(dq, 3, 5).astype(q.dtype)

    queries, gradients, common = (
        _query_tiles(tiling, x, k.shape[2]) for x in (q, gradient, common)
    )
    zeros = jnp.zeros_like(keys, jnp.float32), jnp.zeros_like(values, jnp.float32)
    tiles = jnp.arange(len(queries)), queries, gradients, common, log_sums
    (dk, dv), dq = jax.lax.scan(pull_back, zeros, tiles)
    dk, dv = _from_key_tiles(tiling, dk, k), _from_key_tiles(tiling, dv, v)
    return _from_query_tiles(tiling, dq, q), dk, dv, None


tiled_attention.defvjp(_forward, _backward)


def _seen(tiling, index):
    """Returns the range of indices into [M, ...] at which the queries `index` read S tiles."""
    last = index * tiling.group + tiling.front
    first = jnp.maximum(tiling.front - tiling.group + 1, last - tiling.back)
    return (0 * index if tiling.window is None else first), last + 1


def _take(tiling, tiles, first):
    """Returns the S tiles [S, ...] from `first` on of tiles [M, ...]."""
    return jax.lax.dynamic_slice_in_dim(tiles, first, tiling.group)


def _add(tiling, tiles, first, x):
    """Adds x [S, ...] to the tiles [M, ...] that `_take` returns."""
    return jax.lax.dynamic_update_slice_in_dim(
        tiles, _take(tiling, tiles, first) + x, first, axis=0
    )


def _visible(tiling, index, first, ids):
    """Tells which keys of the tiles from `first` on the queries `index` see: bool [S, B, C, C]."""
    own = index * tiling.group + tiling.front
    positions = jnp.arange(tiling.tile)
    distance = positions[:, None] - positions[None, :] + (own - first) * tiling.tile
    near = distance >= 0 if tiling.window is None else (distance >= 0) & (distance < tiling.window)
    same = _take(tiling, ids, own)[..., :, None] == _take(tiling, ids, first)[..., None, :]
    return near[None, None] & same


def _turned(x):
    """Moves the features before the positions: [S, B, G, ..., C, D] -> [S, B, G, D, ..., C].

    XLA turns an operand of each product whose summed axis does not lie so, scores too.
    """
    return jnp.moveaxis(x, -1, 3)


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _key_tiles(tiling, x):
    """Cuts [B, L, G, D] -> [M, B, G, C, D]."""
    return _cut(tiling, _padded(tiling, x, tiling.front)).transpose(1, 0, 3, 2, 4)


def _from_key_tiles(tiling, x, like):
    """Joins tiles [M, B, G, C, D] -> [B, L, G, D]."""
    rows = _joined(x[tiling.front :].transpose(1, 0, 3, 2, 4))
    return rows[:, : tiling.length].astype(like.dtype)


def _id_tiles(tiling, segments):
    """Cuts int32 [B, L] -> [M, B, C]."""
    return jnp.swapaxes(_cut(tiling, _padded(tiling, segments, tiling.front, _NO_SEGMENT)), 0, 1)


def _query_tiles(tiling, x, groups):
    """Cuts [B, L, H, D] -> [N / S, S, B, G, R, C, D]."""
    tiles = _cut(tiling, _padded(tiling, x, 0))
    batch, count, size, heads, width = tiles.shape
    shape = batch, count // tiling.group, tiling.group, size, groups, heads // groups, width
    rows, _, split, _ = jax.typeof(x).sharding.spec
    spec = jax.P(rows, None, None, None, split, None, None)
    return jax.lax.reshape(tiles, shape, out_sharding=spec).transpose(1, 2, 0, 4, 5, 3, 6)


def _from_query_tiles(tiling, x, like):
    """Joins tiles [N / S, S, B, G, R, C, D] -> [B, L, H, D]."""
    shape = like.shape[0], tiling.num_tiles * tiling.tile, *like.shape[2:]
    spec = jax.typeof(like).sharding.spec
    flat = jax.lax.reshape(x.transpose(2, 0, 1, 5, 3, 4, 6), shape, out_sharding=spec)
    return flat[:, : tiling.length]


def _padded(tiling, x, front, value=0):
    """Pads x [B, L, ...] by `front` tiles before it and to whole tiles at its end."""
    ends = front * tiling.tile, tiling.num_tiles * tiling.tile - tiling.length
    return jnp.pad(x, ((0, 0), ends, *((0, 0),) * (x.ndim - 2)), constant_values=value)


def _cut(tiling, x):
    """Cuts [B, M * C, ...] -> [B, M, C, ...]."""
    return x.reshape(x.shape[0], -1, tiling.tile, *x.shape[2:])


def _joined(x):
    """Joins [B, M, C, ...] -> [B, M * C, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
