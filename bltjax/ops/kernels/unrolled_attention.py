"""Causal and windowed attention in tiles for GPUs, forward and backward, in plain XLA.

As `tiled_attention`, turned inside out: all tiles of queries go at once, each to the tile of keys
that lies a fixed number of tiles before it. The few such distances of a window are written out one
after the other, so that there is no loop, which on a GPU costs a wait of the host in each round
unless the number of rounds is known. Memory is linear in the number of positions.

Letters: B rows, L positions, G key/value heads, R query heads of each, D head width; C positions of
a tile, N tiles of a row.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bltjax.ops import partial_softmax
from bltjax.ops.partial_softmax import MASKED
from bltjax.ops.slots import on_shards

MOST_UNROLLED = 16  # distances between tiles that are written out; more are a loop
MOST_SCORES = 2**26  # scores at a time, of as many rows as fit
_NO_SEGMENT = -(2**31)


class _Tiling(NamedTuple):
    window: int | None
    tile: int  # C
    num_tiles: int  # N
    back: int  # tiles before its own that a query may see


def _tiling(length: int, window: int | None, tile: int | None) -> _Tiling:
    if window is not None and window >= length:
        window = None
    tile = tile or (256 if window is None else min(128, max(64, window // 4)))
    count = math.ceil(length / tile)
    tile = 16 * math.ceil(length / count / 16)  # equal tiles, as tensor cores like them
    count = math.ceil(length / tile)
    back = count - 1 if window is None else min(count - 1, math.ceil((window - 1) / tile))
    return _Tiling(window, tile, count, back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def unrolled_attention(q, k, v, segments, window: int | None = None, tile: int | None = None):
    """Attends from each position to itself and `window` - 1 before it (None: all) in its segment.

    q [B, L, H, D]; k, v [B, L, G, D], G dividing H; segments int32 [B, L] -> [B, L, H, D]. Rows and
    heads may be sharded, positions not.
    """
    return _forward(q, k, v, segments, window, tile)[0]


def _forward(q, k, v, segments, window, tile):
    attend = functools.partial(forward, window=window, tile=tile)
    out, log_sums = on_shards(attend, q, k, v, segments, like=(0, 0))
    out, log_sums = (checkpoint_name(x, "attention") for x in (out, log_sums))
    return out, (q, k, v, segments, out, log_sums)


def _backward(window, tile, saved, gradient):
    pull_back = functools.partial(backward, window=window, tile=tile)
    return *on_shards(pull_back, *saved, gradient, like=(0, 1, 2)), None


unrolled_attention.defvjp(_forward, _backward)


def forward(q, k, v, segments, window: int | None = None, tile: int | None = None):
    """Attends on one device; returns the result and the logs of softmax sums float32 [B, L, H, 1].

    Arguments as of `unrolled_attention`.
    """
    tiling = _tiling(q.shape[1], window, tile)
    # Else masks, as large as the scores, are made once for all layers, and kept.
    q, segments = jax.lax.optimization_barrier((q, segments))

    def attend(q, k, v, segments):
        queries, keys, values = _query_tiles(tiling, q, k), _tiles(tiling, k), _tiles(tiling, v)
        ids = _id_tiles(tiling, segments)

        def add_keys(distance, sums):
            scores = _scores(tiling, distance, queries, keys, ids)
            near = _keys_at(values, distance)
            read = functools.partial(_read, values=near)
            part = jax.tree.map(lambda x: _queries_at(x, distance), sums)
            part = partial_softmax.add(part, scores, read)
            return jax.tree.map(functools.partial(_with_queries, distance), sums, part)

        start = partial_softmax.empty(jnp.zeros_like(queries, jnp.float32))
        sums = _over_distances(tiling, add_keys, start)
        top, total, _ = sums
        out = _from_query_tiles(partial_softmax.mean(sums).astype(v.dtype), q)
        log_sums = (top + jnp.log(total))[..., None]
        return out, _from_query_tiles(log_sums, q)

    return _by_rows(tiling, attend, q, k, v, segments)


def backward(q, k, v, segments, out, log_sums, gradient, window=None, tile=None):
    """Returns gradients in q, k and v on one device, of the results of `forward`."""
    tiling = _tiling(q.shape[1], window, tile)
    q, segments = jax.lax.optimization_barrier((q, segments))  # as in `forward`

    def pull_back(q, k, v, segments, out, log_sums, gradient):
        queries, keys, values = _query_tiles(tiling, q, k), _tiles(tiling, k), _tiles(tiling, v)
        ids = _id_tiles(tiling, segments)
        # The term that the gradients of all scores of a softmax share.
        common = _product("blhd,blhd->blh", gradient, out)[..., None]
        gradients, common, logs = (_query_tiles(tiling, x, k) for x in (gradient, common, log_sums))

        def add_keys(distance, sums):
            dq, dk, dv = sums
            scores = _scores(tiling, distance, queries, keys, ids)
            near_k, near_v = _keys_at(keys, distance), _keys_at(values, distance)
            q, d_out, shared, log = (
                _queries_at(x, distance) for x in (queries, gradients, common, logs)
            )
            weights = jnp.exp(scores - log)
            d_weights = _product("nbgrcd,nbgkd->nbgrck", d_out, near_v)
            scale = q.shape[-1] ** -0.5
            d_scores = (weights * (d_weights - shared) * scale).astype(q.dtype)
            more = _queries_at(dq, distance) + _product("nbgrck,nbgkd->nbgrcd", d_scores, near_k)
            dq = _with_queries(distance, dq, more)
            dk = _add_keys(distance, dk, _product("nbgrck,nbgrcd->nbgkd", d_scores, q))
            dv = _add_keys(distance, dv, _product("nbgrck,nbgrcd->nbgkd", weights, d_out))
            return dq, dk, dv

        start = tuple(jnp.zeros_like(x, jnp.float32) for x in (queries, keys, values))
        dq, dk, dv = _over_distances(tiling, add_keys, start)
        dq = _from_query_tiles(dq.astype(q.dtype), q)
        return dq, _from_tiles(dk.astype(k.dtype), k), _from_tiles(dv.astype(v.dtype), v)

    return _by_rows(tiling, pull_back, q, k, v, segments, out, log_sums, gradient)


def _by_rows(tiling, function, q, *others):
    """Calls a function on as many rows at a time as MOST_SCORES allows."""
    batch, _, heads, _ = q.shape
    row = heads * tiling.num_tiles * tiling.tile**2
    together = max(
        [n for n in range(1, batch + 1) if batch % n == 0 and n * row <= MOST_SCORES] or [1]
    )
    if together == batch:
        return function(q, *others)
    parts = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), (q, *others))
    found = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), found)


def _over_distances(tiling, add_keys, sums):
    """Adds the keys at each distance in tiles, the queries' own first."""
    if tiling.back >= MOST_UNROLLED:
        return jax.lax.fori_loop(0, tiling.back + 1, add_keys, sums)
    for distance in range(tiling.back + 1):
        sums = add_keys(distance, sums)
    return sums


# A distance is a number, whose tiles are cut out; or traced, and tiles that have no partner wrap
# around, to be masked.


def _queries_at(tiles, distance):
    """Returns the tiles [N, ...] whose partner that far before them exists."""
    return tiles[distance:] if isinstance(distance, int) else tiles


def _keys_at(tiles, distance):
    """Returns the partners of `_queries_at`."""
    if isinstance(distance, int):
        return tiles[: len(tiles) - distance]
    return jnp.roll(tiles, distance, axis=0)


def _with_queries(distance, tiles, new):
    """Puts new tiles in the place of those that `_queries_at` returns."""
    if isinstance(distance, int) and distance:
        return jnp.concatenate([tiles[:distance], new])
    return new


def _add_keys(distance, tiles, x):
    """Adds to the tiles that `_keys_at` returns."""
    if not isinstance(distance, int):
        return tiles + jnp.roll(x, -distance, axis=0)
    cut = len(tiles) - distance
    return jnp.concatenate([tiles[:cut] + x, tiles[cut:]]) if distance else tiles + x


def _scores(tiling, distance, queries, keys, ids):
    """Returns the masked scores, in float32, of queries at a distance: [N, B, G, R, C, C]."""
    q, k = _queries_at(queries, distance), _keys_at(keys, distance)
    positions = jnp.arange(tiling.tile)
    apart = positions[:, None] - positions[None, :] + distance * tiling.tile
    near = apart >= 0 if tiling.window is None else (apart >= 0) & (apart < tiling.window)
    own, theirs = _queries_at(ids, distance), _keys_at(ids, distance)
    visible = near[None, None] & (own[..., :, None] == theirs[..., None, :])
    if not isinstance(distance, int):
        visible &= (jnp.arange(len(ids)) >= distance)[:, None, None, None]
    scores = _product("nbgrcd,nbgkd->nbgrck", q, k) * q.shape[-1] ** -0.5
    return jnp.where(visible[:, :, None, None], scores, MASKED)


def _read(weights, values):
    return _product("nbgrck,nbgkd->nbgrcd", weights, values)


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _id_tiles(tiling, segments):
    """Cuts int32 [B, L] -> [N, B, C]."""
    return jnp.swapaxes(_cut(tiling, segments, _NO_SEGMENT), 0, 1)


def _tiles(tiling, x):
    """Cuts [B, L, G, D] -> [N, B, G, C, D]."""
    return _cut(tiling, x).transpose(1, 0, 3, 2, 4)


def _query_tiles(tiling, x, k):
    """Cuts [B, L, H, D] -> [N, B, G, R, C, D], G the heads of k [B, L, G, ...]."""
    tiles = _tiles(tiling, x)
    return tiles.reshape(*tiles.shape[:2], k.shape[2], -1, *tiles.shape[3:])


def _from_tiles(tiles, like):
    """Joins [N, B, G, C, D] -> [B, L, G, D], L that of `like`."""
    rows = tiles.transpose(1, 0, 3, 2, 4)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])[:, : like.shape[1]]


def _from_query_tiles(tiles, like):
    """Joins [N, B, G, R, C, D] -> [B, L, H, D]."""
    count, batch, groups, times, size, width = tiles.shape
    return _from_tiles(tiles.reshape(count, batch, groups * times, size, width), like)


def _cut(tiling, x, value=0):
    """Pads [B, L, ...] to whole tiles and cuts it -> [B, N, C, ...]."""
    end = tiling.num_tiles * tiling.tile - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, end), *((0, 0),) * (x.ndim - 2)), constant_values=value)
    return x.reshape(x.shape[0], -1, tiling.tile, *x.shape[2:])
