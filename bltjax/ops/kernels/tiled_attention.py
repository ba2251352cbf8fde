"""Causal and windowed attention in tiles, forward and backward, in plain XLA.

Scores exist for a few tiles of queries and of keys at a time, tiles that no query sees are left
out, and the backward pass computes scores again from the log of each softmax's sum
(FlashAttention-2, 2023). So memory is linear in the number of positions, and cost is in the number
of visible pairs. Softmaxes and sums are in float32.

Letters: B rows, L positions, G key/value heads, R query heads of each, D head width; S tiles at a
time, of C positions each; N tiles of queries, M of keys.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_MASKED = -1e30  # finite, so that a tile where a query sees nothing yields no NaN
_NO_SEGMENT = -(2**31)


class Plan(NamedTuple):
    """How a row is cut up; all static."""

    window: int | None
    length: int  # L
    tile: int  # C
    together: int  # S
    back: int  # of a window: how many tiles before its own a query may see
    front: int  # empty tiles before the first key, for tiles that look back together

    @property
    def num_tiles(self):  # N
        step = self.tile * self.together
        return -(-self.length // step) * self.together

    @property
    def rounds(self):
        """Of all tiles of queries together: how often S of them look at S tiles of keys."""
        groups = range(self.num_tiles // self.together)
        return sum(int(stop) - int(start) for start, stop in (_seen(self, i) for i in groups))

    @property
    def pairs_of_a_round(self):
        return self.together * self.tile**2


def _plan(q, window, tile):
    return plan_tiles(*jax.typeof(q).sharding.shard_shape(q.shape)[:3], window, tile)


def plan_tiles(batch, length, heads, window: int | None, tile: int | None = None) -> Plan:
    """How the rows of one device are cut up."""
    if window is not None and window >= length:
        window = None  # fewer tiles
    # The fastest on CPUs; a tile that is wider than its window computes mostly what is masked.
    tile = tile or (256 if window is None else min(128, max(32, window // 2)))
    tile = _round_up(math.ceil(length / math.ceil(length / tile)), 8)  # even ones: little padding
    if window is None:
        return Plan(None, length, tile, 1, 0, 0)
    # As many tiles at a time as keep all cores busy and still fit in their caches.
    together = max(1, min(16 // (batch * heads), length // tile))
    back = math.ceil((window - 1) / tile)
    return Plan(window, length, tile, together, back, back if together > 1 else 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def tiled_attention(q, k, v, segments, window: int | None = None, tile: int | None = None):
    """Each position sees itself and the `window` - 1 before it (None: all), in its segment.

    q [B, L, H, D]; k, v [B, L, G, D], G dividing H; segments int32 [B, L] -> [B, L, H, D].
    """
    return _forward(q, k, v, segments, window, tile)[0]


def _forward(q, k, v, segments, window, tile):
    plan = _plan(q, window, tile)
    keys, values, ids = _key_tiles(plan, k), _key_tiles(plan, v), _id_tiles(plan, segments)

    def attend(_, tiles):
        index, q = tiles

        def add_keys(first, sums):
            top, total, mixed = sums
            scores = _scores(plan, index, first, q, keys, ids)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            kept = jnp.exp(top - new_top)
            read = _product("sbgrck,sbgkd->sbgrcd", weights, _take(plan, values, first))
            return new_top, total * kept + weights.sum(axis=-1), mixed * kept[..., None] + read

        mixed = jnp.zeros_like(q, jnp.float32)
        start = jnp.full_like(mixed[..., 0], _MASKED), jnp.zeros_like(mixed[..., 0]), mixed
        top, total, mixed = jax.lax.fori_loop(*_seen(plan, index), add_keys, start)
        return None, ((mixed / total[..., None]).astype(v.dtype), top + jnp.log(total))

    queries = _query_tiles(plan, q, k.shape[2])
    _, (out, log_sums) = jax.lax.scan(attend, None, (jnp.arange(len(queries)), queries))
    out = checkpoint_name(_from_query_tiles(plan, out, q), "attention")
    log_sums = checkpoint_name(log_sums, "attention")
    return out, (q, k, v, segments, out, log_sums)


def _backward(window, tile, saved, gradient):
    q, k, v, segments, out, log_sums = saved
    plan = _plan(q, window, tile)
    keys, values, ids = _key_tiles(plan, k), _key_tiles(plan, v), _id_tiles(plan, segments)
    # What the gradients of a softmax's scores have in common.
    common = _product("blhd,blhd->blh", gradient, out)[..., None]

    def pull_back(sums, tiles):
        index, q, gradient, common, log_sums = tiles

        def add_keys(first, sums):
            dq, dk, dv = sums
            k, v = _take(plan, keys, first), _take(plan, values, first)
            scores = _scores(plan, index, first, q, keys, ids)
            weights = jnp.exp(scores - log_sums[..., None])
            d_weights = _product("sbgrcd,sbgkd->sbgrck", gradient, v)
            d_scores = (weights * (d_weights - common) * q.shape[-1] ** -0.5).astype(q.dtype)
            dq = dq + _product("sbgrck,sbgkd->sbgrcd", d_scores, k)
            dk = _add(plan, dk, first, _product("sbgrck,sbgrcd->sbgkd", d_scores, q))
            dv = _add(plan, dv, first, _product("sbgrck,sbgrcd->sbgkd", weights, gradient))
            return dq, dk, dv

        start = jnp.zeros_like(q, jnp.float32), *sums
        dq, *sums = jax.lax.fori_loop(*_seen(plan, index), add_keys, start)
        return tuple(sums), dq.astype(q.dtype)

    queries, gradients, common = (_query_tiles(plan, x, k.shape[2]) for x in (q, gradient, common))
    zeros = jnp.zeros_like(keys, jnp.float32), jnp.zeros_like(values, jnp.float32)
    tiles = jnp.arange(len(queries)), queries, gradients, common, log_sums
    (dk, dv), dq = jax.lax.scan(pull_back, zeros, tiles)
    dk, dv = _from_key_tiles(plan, dk, k), _from_key_tiles(plan, dv, v)
    return _from_query_tiles(plan, dq, q), dk, dv, None


tiled_attention.defvjp(_forward, _backward)


def _seen(plan, index):
    """First and last + 1 of the places in [M, ...] where the queries `index` look at S tiles."""
    last = index * plan.together + plan.front
    first = jnp.maximum(plan.front - plan.together + 1, last - plan.back)
    return (0 * index if plan.window is None else first), last + 1


def _take(plan, tiles, first):
    """What the queries look at of tiles [M, ...] -> [S, ...]."""
    return jax.lax.dynamic_slice_in_dim(tiles, first, plan.together)


def _add(plan, tiles, first, x):
    """tiles [M, ...] with x [S, ...] added where `_take` takes."""
    return jax.lax.dynamic_update_slice_in_dim(tiles, _take(plan, tiles, first) + x, first, axis=0)


def _scores(plan, index, first, q, keys, ids):
    """Masked scores in float32 of q [S, B, G, R, C, D] -> [S, B, G, R, C, C]."""
    own = index * plan.together + plan.front
    positions = jnp.arange(plan.tile)
    distance = positions[:, None] - positions[None, :] + (own - first) * plan.tile
    near = distance >= 0 if plan.window is None else (distance >= 0) & (distance < plan.window)
    same = _take(plan, ids, own)[..., :, None] == _take(plan, ids, first)[..., None, :]
    scores = _product("sbgrcd,sbgkd->sbgrck", q, _take(plan, keys, first)) * q.shape[-1] ** -0.5
    visible = near[None, None] & same
    return jnp.where(visible[:, :, None, None], scores, _MASKED)


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _key_tiles(plan, x):
    """[B, L, G, D] -> [M, B, G, C, D]."""
    return _cut(plan, _padded(plan, x, plan.front)).transpose(1, 0, 3, 2, 4)


def _from_key_tiles(plan, x, like):
    """[M, B, G, C, D] -> [B, L, G, D]."""
    return _joined(x[plan.front :].transpose(1, 0, 3, 2, 4))[:, : plan.length].astype(like.dtype)


def _id_tiles(plan, segments):
    """int32 [B, L] -> [M, B, C]."""
    return jnp.swapaxes(_cut(plan, _padded(plan, segments, plan.front, _NO_SEGMENT)), 0, 1)


def _query_tiles(plan, x, groups):
    """[B, L, H, D] -> [N / S, S, B, G, R, C, D]."""
    tiles = _cut(plan, _padded(plan, x, 0))
    batch, count, size, heads, width = tiles.shape
    shape = batch, count // plan.together, plan.together, size, groups, heads // groups, width
    rows, _, split, _ = jax.typeof(x).sharding.spec
    spec = jax.P(rows, None, None, None, split, None, None)
    return jax.lax.reshape(tiles, shape, out_sharding=spec).transpose(1, 2, 0, 4, 5, 3, 6)


def _from_query_tiles(plan, x, like):
    """[N / S, S, B, G, R, C, D] -> [B, L, H, D]."""
    shape = like.shape[0], plan.num_tiles * plan.tile, *like.shape[2:]
    spec = jax.typeof(like).sharding.spec
    flat = jax.lax.reshape(x.transpose(2, 0, 1, 5, 3, 4, 6), shape, out_sharding=spec)
    return flat[:, : plan.length]


def _padded(plan, x, front, value=0):
    """x [B, L, ...] with `front` tiles before it, and whole tiles at the end."""
    ends = front * plan.tile, plan.num_tiles * plan.tile - plan.length
    return jnp.pad(x, ((0, 0), ends, *((0, 0),) * (x.ndim - 2)), constant_values=value)


def _cut(plan, x):
    """[B, M * C, ...] -> [B, M, C, ...]."""
    return x.reshape(x.shape[0], -1, plan.tile, *x.shape[2:])


def _joined(x):
    """[B, M, C, ...] -> [B, M * C, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _round_up(number, step):
    return -(-number // step) * step
