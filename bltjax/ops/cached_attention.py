"""Attention of new positions to cached ones, for generation.

A ring of R slots holds the newest positions of a row, position p in slot p mod R; a store holds all
of them, position p in slot p. Each row is at a position of its own. Softmaxes are in float32.

Letters: B rows, T new positions, H query heads, G key/value heads, D head width.
"""

import jax
import jax.numpy as jnp

from bltjax.ops import partial_softmax
from bltjax.ops.slots import below, on_shards, read_row, span, write_rows

BLOCK = 128  # slots of a store that are read at a time


def ring_attention(q, k, v, ring_k, ring_v, first, count, earliest):
    """Attends from new positions to the ring and to new ones not later, from `earliest` on.

    q [B, T, H, D]; k, v [B, T, G, D]: positions first .. first + T - 1, of which the first `count`
    [B] are kept, or if T is 1 all. ring_k, ring_v [B, G, R, D], R at least T; earliest int32 [B, T]
    -> [B, T, H, D], and the rings.

    A slot counts as the latest position that it can hold. So a row may step back by n positions if
    R is n more than any query looks back.
    """

    def attend(q, k, v, ring_k, ring_v, first, count, earliest):
        num_new, num_slots = q.shape[1], ring_k.shape[2]
        positions = span(first, 0, num_new)
        kept = below(count, num_new) | (num_new == 1)
        slots = jnp.where(kept, positions % num_slots, num_slots)

        def written():
            return _write(ring_k, k, slots), _write(ring_v, v, slots)

        def see_rings(sums, rings, last):
            held = last - (last - jnp.arange(num_slots, dtype=jnp.int32)[None]) % num_slots
            return _add(sums, q, *rings, held[:, None] >= earliest[..., None])

        if num_new == 1:  # Written first, so that XLA sees the old ring unused and writes in place.
            rings = written()
            return _result(see_rings(_no_sums(q, k.shape[2]), rings, positions), q), *rings
        sums = _see_new(q, k, v, first, earliest)
        return _result(see_rings(sums, (ring_k, ring_v), positions[:, :1] - 1), q), *written()

    return on_shards(attend, q, k, v, ring_k, ring_v, first, count, earliest, like=(0, 3, 4))


def store_attention(q, k, v, store_k, store_v, first, count, block: int = BLOCK):
    """Attends from new positions to all stored ones before `first`, and to new ones not later.

    Shapes as in `ring_attention`; the number of slots is a multiple of `block`, or less. Cost
    follows the longest row, not the number of slots.
    """

    def attend(q, k, v, store_k, store_v, first, count):
        groups, num_slots = store_k.shape[1:3]
        num_new, size = q.shape[1], min(block, num_slots)
        slots = jnp.where(below(count, num_new), span(first, 0, num_new), num_slots)

        def written():
            return _write(store_k, k, slots), _write(store_v, v, slots)

        def see_stores(sums, stores, length):
            def add_block(i, sums):
                keys_values = (
                    jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=2) for x in stores
                )
                visible = below(length - i * size, size)
                return _add(sums, q, *keys_values, visible[:, None])

            return jax.lax.fori_loop(0, (length.max() + size - 1) // size, add_block, sums)

        if num_new == 1:
            stores = written()
            sums = see_stores(_no_sums(q, groups), stores, first + count)
            return _result(sums, q), *stores
        sums = _see_new(q, k, v, first, jnp.zeros_like(first)[:, None])
        return _result(see_stores(sums, (store_k, store_v), first), q), *written()

    return on_shards(attend, q, k, v, store_k, store_v, first, count, like=(0, 3, 4))


def span_attention(q, store_k, store_v, starts, ends, block: int = 16):
    """Attends from the K queries of each of M spans to stored positions start .. end - 1.

    q [B, M, K, H, D]; store_k, store_v [B, G, P, D]; starts, ends int32 [B, M]
    -> [B, M, K, H, D], 0 for empty spans. Cost follows the longest span.
    """

    def attend(q, store_k, store_v, starts, ends):
        rows, spans = q.shape[:2]
        flat = q.reshape(rows * spans, *q.shape[2:])  # spans do not see each other

        def add_block(i, sums):
            at = span(starts + i * block, 0, block)
            keys, values = (_take_each(x, at) for x in (store_k, store_v))
            visible = (at < ends[..., None]).reshape(rows * spans, 1, block)
            return _add(sums, flat, keys, values, visible)

        num_blocks = ((ends - starts).max() + block - 1) // block
        sums = jax.lax.fori_loop(0, num_blocks, add_block, _no_sums(flat, store_k.shape[1]))
        return _result(sums, flat).reshape(q.shape)

    return on_shards(attend, q, store_k, store_v, starts, ends)


def slots_attention(q, cache_k, cache_v, slots, visible):
    """Attends from each new position to the cached slots that `slots` names for it.

    q [B, T, H, D]; cache_k, cache_v [B, G, R, D]; slots int32 and visible bool [B, T, M]
    -> [B, T, H, D], 0 where nothing is visible.
    """

    def attend(q, cache_k, cache_v, slots, visible):
        rows, new = q.shape[:2]
        flat = q.reshape(rows * new, 1, *q.shape[2:])
        keys, values = (_take_each(x, slots) for x in (cache_k, cache_v))
        visible = visible.reshape(len(flat), 1, -1)
        sums = _add(_no_sums(flat, keys.shape[1]), flat, keys, values, visible)
        return _result(sums, flat).reshape(q.shape)

    return on_shards(attend, q, cache_k, cache_v, slots, visible)


def _take_each(cache, slots):
    """Reads slots [B, M, S] of a cache [B, G, R, D] -> [B * M, G, S, D]."""
    rows, groups, _, width = cache.shape
    taken = jax.vmap(read_row)(cache, slots.reshape(rows, -1))
    taken = taken.reshape(rows, groups, *slots.shape[1:], width)
    return jnp.swapaxes(taken, 1, 2).reshape(-1, groups, slots.shape[-1], width)


def _write(cache, new, slots):
    """Writes new [B, T, G, D] into slots [B, T] of a cache [B, G, R, D]."""
    return write_rows(cache, jnp.swapaxes(new, 1, 2), slots)


def _no_sums(q, groups):
    batch, new, heads, width = q.shape
    shape = batch, groups, heads // groups, new, width
    return partial_softmax.empty(jnp.zeros(shape, jnp.float32))


def _add(sums, q, keys, values, visible):
    """Adds keys, values [B, G, S, D] that visible [B, T or 1, S] lets each query see."""
    queries = q.reshape(*q.shape[:2], keys.shape[1], -1, q.shape[3])
    scores = _product("btgrd,bgsd->bgrts", queries, keys) * q.shape[3] ** -0.5

    def read(weights):
        return _product("bgrts,bgsd->bgrtd", weights, values)

    return partial_softmax.add(sums, scores, read, visible[:, None, None])


def _see_new(q, k, v, first, earliest):
    """Sums over the new positions that each new position sees."""
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    positions = span(first, 0, q.shape[1])
    visible = positions[:, None] <= positions[..., None]
    visible &= positions[:, None] >= earliest[..., None]
    return _add(_no_sums(q, k.shape[2]), q, keys, values, visible)


def _result(sums, q):
    return jnp.moveaxis(partial_softmax.mean(sums), 3, 1).reshape(q.shape).astype(q.dtype)


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=jnp.float32)
