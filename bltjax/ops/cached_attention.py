"""Attention of new positions to cached ones, for generation.

A ring of R slots holds the newest positions of a row, position p in slot p mod R; a store holds all
of them, position p in slot p. Each row is at a position of its own. Softmaxes are in float32.

A cache is (keys, values), each [B, G, slots, D], or on accelerators a single array of both side by
side [B, G, slots, 2 D], which a step writes at once. CPUs would copy the halves before a product.
There also a loop reads as much of a store as the longest row needs. On accelerators a store is read
whole: the host waits for a GPU in each round of a loop whose rounds are not known.

Letters: B rows, T new positions, H query heads, G key/value heads, D head width.
"""

import jax
import jax.numpy as jnp

from bltjax.ops import partial_softmax, platform
from bltjax.ops.slots import below, on_shards, read_row, read_some_rows, span, write_rows

BLOCK = 128  # slots of a store that are read at a time on CPUs

Cache = tuple[jax.Array, ...]


def ring_attention(q, k, v, ring: Cache, first, count, earliest):
    """Attends from new positions to the ring and to new ones not later, from `earliest` on.

    q [B, T, H, D]; k, v [B, T, G, D]: positions first .. first + T - 1, of which the first `count`
    [B] are kept, or if T is 1 all; earliest int32 [B, T] -> [B, T, H, D], and the ring. Of more new
    positions than it has slots, the ring keeps the last.

    A slot counts as the latest position that it can hold. So a row may step back by n positions if
    R is n more than any query looks back.
    """

    def attend(q, k, v, first, count, earliest, *ring):
        num_new, num_slots = q.shape[1], ring[0].shape[2]
        positions = span(first, 0, num_new)
        kept = below(count, num_new) | (num_new == 1)
        if num_new > num_slots:
            kept &= ~below(count - num_slots, num_new)
        slots = jnp.where(kept, positions % num_slots, num_slots)

        def visible(last):
            held = last - (last - jnp.arange(num_slots, dtype=jnp.int32)[None]) % num_slots
            return held[:, None] >= earliest[..., None]

        if num_new == 1:  # Written first, so that XLA sees the old ring unused and writes in place.
            ring = write_cache(ring, k, v, slots)
            return _attend_once(q, ring, visible(positions)), *ring
        sums = _see_new(q, k, v, first, earliest)
        sums = _add(sums, q, *_keys_values(ring, q), visible(positions[:, :1] - 1))
        return _result(sums, q), *write_cache(ring, k, v, slots)

    return _on_shards_of_cache(attend, q, k, v, first, count, earliest, cache=ring)


def block_ring_attention(q, k, v, ring: Cache, starts, window: int):
    """Attends from the rows of a block to each other, and to the `window` positions before it.

    q [B, T, H, D]; k, v [B, T, G, D]: positions starts .. starts + T - 1, which are not kept -> [B,
    T, H, D]. The ring holds no position T or more after the start.
    """

    def attend(q, k, v, starts, *ring):
        keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        sums = _add(_no_sums(q, k.shape[2]), q, keys, values, jnp.ones((1, 1, q.shape[1]), bool))
        num_slots, last = ring[0].shape[2], starts[:, None] - 1
        held = last - (last - jnp.arange(num_slots, dtype=jnp.int32)[None]) % num_slots
        visible = (held >= 0) & (held > last - window)
        return _result(_add(sums, q, *_keys_values(ring, q), visible[:, None]), q)

    return on_shards(attend, q, k, v, starts, *ring)


def store_attention(q, k, v, store: Cache, first, count, block: int = BLOCK, rows=None):
    """Attends from new positions to all stored ones before `first`, and to new ones not later.

    Shapes as in `ring_attention`; the number of slots is a multiple of `block`, or less. Rows of
    count 0 give anything. On CPUs cost follows the longest row with a count, not the number of
    slots. rows: of the store, see `slots.py`; for CPUs.
    """
    in_blocks = platform.platform() == "cpu"
    more = () if rows is None else (rows,)

    def attend(q, k, v, first, count, *rest):
        rows, store = (rest[0], rest[1:]) if more else (None, rest)
        groups, num_slots = store[0].shape[1:3]
        num_new, size = q.shape[1], min(block, num_slots) if in_blocks else num_slots
        slots = jnp.where(below(count, num_new), span(first, 0, num_new), num_slots)

        def see_store(sums, store, length):
            def add_block(i, sums):
                part = (_block_of(x, i * size, size, rows) for x in store)
                visible = below(length - i * size, size)
                return _add(sums, q, *_keys_values(tuple(part), q), visible[:, None])

            if not in_blocks:
                return add_block(0, sums)
            return jax.lax.fori_loop(0, (length.max() + size - 1) // size, add_block, sums)

        before = jnp.where(count > 0, first, 0)
        if num_new == 1:
            store, length = write_cache(store, k, v, slots, rows), before + count
            if in_blocks:
                return _result(see_store(_no_sums(q, groups), store, length), q), *store
            return _attend_once(q, store, below(length, num_slots)[:, None]), *store
        sums = _see_new(q, k, v, first, jnp.zeros_like(first)[:, None])
        return _result(see_store(sums, store, before), q), *write_cache(store, k, v, slots, rows)

    return _on_shards_of_cache(attend, q, k, v, first, count, *more, cache=store)


def _block_of(store, start, size: int, rows):
    """Returns slots start .. start + size - 1 of rows of a store [B, G, S, D] ."""
    if rows is None:
        return jax.lax.dynamic_slice_in_dim(store, start, size, axis=2)
    _, groups, _, width = store.shape

    def of_row(row):
        return jax.lax.dynamic_slice(store, (row, 0, start, 0), (1, groups, size, width))[0]

    return jax.vmap(of_row)(rows)


def span_attention(q, store: Cache, starts, ends, block: int = 16, rows=None):
    """Attends from the K queries of each of M spans to stored positions start .. end - 1.

    q [B, M, K, H, D]; starts, ends int32 [B, M] -> [B, M, K, H, D], 0 for empty spans. Cost follows
    the longest span; on accelerators a single span reads the store whole. rows: of the store, see
    `slots.py`; for CPUs.
    """
    at_once = platform.platform() != "cpu" and q.shape[1] == 1

    more = () if rows is None else (rows,)

    def attend(q, starts, ends, *rest):
        chosen, store = (rest[0], rest[1:]) if more else (None, rest)
        num_rows, spans = q.shape[:2]
        flat = q.reshape(num_rows * spans, *q.shape[2:])  # spans do not see each other
        if at_once:
            positions = jnp.arange(store[0].shape[2], dtype=jnp.int32)[None]
            visible = (positions >= starts) & (positions < ends)
            return _attend_once(flat, store, visible[:, None]).reshape(q.shape)

        def add_block(i, sums):
            at = span(starts + i * block, 0, block)
            part = tuple(_take_each(x, at, chosen) for x in store)
            visible = (at < ends[..., None]).reshape(num_rows * spans, 1, block)
            return _add(sums, flat, *_keys_values(part, q), visible)

        num_blocks = ((ends - starts).max() + block - 1) // block
        sums = jax.lax.fori_loop(0, num_blocks, add_block, _no_sums(flat, store[0].shape[1]))
        return _result(sums, flat).reshape(q.shape)

    return on_shards(attend, q, starts, ends, *more, *store)


def slots_attention(q, cache: Cache, slots, visible):
    """Attends from each new position to the cached slots that `slots` names for it.

    q [B, T, H, D]; slots int32 and visible bool [B, T, M] -> [B, T, H, D], 0 where nothing is
    visible.
    """

    def attend(q, slots, visible, *cache):
        rows, new = q.shape[:2]
        flat = q.reshape(rows * new, 1, *q.shape[2:])
        taken = tuple(_take_each(x, slots) for x in cache)
        return _attend_once(flat, taken, visible.reshape(len(flat), 1, -1)).reshape(q.shape)

    return on_shards(attend, q, slots, visible, *cache)


def write_cache(cache: Cache, keys, values, slots, rows=None) -> Cache:
    """Writes keys, values [B, M, G, D] into slots int32 [B, M]; drops slots from R on."""
    new = (keys, values) if len(cache) == 2 else (jnp.concatenate([keys, values], axis=-1),)
    return tuple(
        write_rows(x, jnp.swapaxes(y, 1, 2), slots, rows) for x, y in zip(cache, new, strict=True)
    )


def _on_shards_of_cache(attend, q, *inputs, cache: Cache):
    """Calls attend(q, *inputs, *cache) on each device; returns its result and the cache."""
    arguments = (q, *inputs, *cache)
    of_cache = range(len(arguments) - len(cache), len(arguments))
    out, *cache = on_shards(attend, *arguments, like=(0, *of_cache))
    return out, tuple(cache)


def _keys_values(cache: Cache, q):
    """Returns keys and values [B, G, S, D] of a cache, for queries [..., D]."""
    width = q.shape[-1]
    return cache if len(cache) == 2 else (cache[0][..., :width], cache[0][..., width:])


def _take_each(cache, slots, rows=None):
    """Reads slots [B, M, S] of a cache [B, G, R, D] -> [B * M, G, S, D]."""
    num_rows, (_, groups, _, width) = len(slots), cache.shape
    flat = slots.reshape(num_rows, -1)
    taken = jax.vmap(read_row)(cache, flat) if rows is None else read_some_rows(cache, flat, rows)
    taken = taken.reshape(num_rows, groups, *slots.shape[1:], width)
    return jnp.swapaxes(taken, 1, 2).reshape(-1, groups, slots.shape[-1], width)


def _attend_once(q, cache: Cache, visible):
    """Attends from q [B, T, H, D] to the slots that visible [B, T or 1, S] lets each query see.

    -> [B, T, H, D], 0 where nothing is visible. A plain softmax: XLA makes one kernel of it.
    """
    keys, values = _keys_values(cache, q)
    visible = visible[:, None, None]
    scores = jnp.where(visible, _scores(q, keys), partial_softmax.MASKED)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return _as_queries(_read(jnp.where(visible, weights, 0), values), q)


def _no_sums(q, groups):
    batch, new, heads, width = q.shape
    shape = batch, groups, heads // groups, new, width
    return partial_softmax.empty(jnp.zeros(shape, jnp.float32))


def _add(sums, q, keys, values, visible):
    """Adds keys, values [B, G, S, D] that visible [B, T or 1, S] lets each query see."""
    scores = _scores(q, keys)
    return partial_softmax.add(
        sums, scores, lambda weights: _read(weights, values), visible[:, None, None]
    )


def _see_new(q, k, v, first, earliest):
    """Sums over the new positions that each new position sees."""
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    positions = span(first, 0, q.shape[1])
    visible = positions[:, None] <= positions[..., None]
    visible &= positions[:, None] >= earliest[..., None]
    return _add(_no_sums(q, k.shape[2]), q, keys, values, visible)


def _result(sums, q):
    return _as_queries(partial_softmax.mean(sums), q)


def _as_queries(mixed, q):
    """Turns [B, G, R, T, D] into the shape and dtype of queries [B, T, H, D]."""
    return jnp.moveaxis(mixed, 3, 1).reshape(q.shape).astype(q.dtype)


def _scores(q, keys):
    """Returns scores float32 [B, G, R, T, S] of q [B, T, H, D] against keys [B, G, S, D]."""
    queries = q.reshape(*q.shape[:2], keys.shape[1], -1, q.shape[3])
    if queries.shape[1] == queries.shape[3] == 1:  # a vector: CPUs read the keys four times faster
        scores = _product("bgd,bgsd->bgs", queries[:, 0, :, 0], keys)[:, :, None, None]
    else:
        scores = _product("btgrd,bgsd->bgrts", queries, keys)
    return scores * q.shape[3] ** -0.5


def _read(weights, values):
    if weights.shape[2] == weights.shape[3] == 1:
        return _product("bgs,bgsd->bgd", weights[:, :, 0, 0], values)[:, :, None, None]
    return _product("bgrts,bgsd->bgrtd", weights, values)


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=jnp.float32)
