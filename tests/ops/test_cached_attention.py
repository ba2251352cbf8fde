"""Attention to caches against a softmax over all positions under a dense mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.ops import platform
from bltjax.ops.cached_attention import (
    ring_attention,
    slots_attention,
    span_attention,
    store_attention,
)

CLOSE = dict(rtol=0, atol=2e-6)
D, S = 4, 24  # width of a head, positions of a row
HEADS = [(1, 1), (4, 2), (3, 1)]  # of queries, of keys and values
DEVICES = st.sampled_from(["cpu", "gpu"])
SEEDS = st.integers(0, 2**32 - 1)
# Steps of three rows: how far each goes back, and how many positions it then keeps.
STEPS = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=3),
    min_size=3,
    max_size=10,
)


def dense(q, k, v, mask):
    """Softmax of q [N, H, D] over k, v [M, G, D] where mask [N, M]; 0 where nothing is seen."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    weights = np.exp(np.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5) * mask
    total = weights.sum(-1, keepdims=True)
    return np.einsum("hnm,mhd->nhd", weights / np.where(total > 0, total, 1), v)


def as_cache(keys, values, joined=False):
    """The two forms that a cache has."""
    return (np.concatenate([keys, values], axis=-1),) if joined else (keys, values)


class Rows:
    """Rows that read positions, some of them again and with other content."""

    def __init__(self, batch, heads, groups, num_slots, joined, seed):
        self.rng = np.random.default_rng(seed)
        self.heads, self.batch = heads, batch
        self.keys, self.values = self.rng.normal(size=(2, batch, S, groups, D))
        self.cache = as_cache(*np.zeros((2, batch, groups, num_slots, D), np.float32), joined)
        self.length, self.reached = np.zeros(batch, int), np.zeros(batch, int)

    def step(self, attention, moves, num_new, back, visible):
        """moves (back, count) of each row; visible(position) -> bool [S], of those up to it."""
        moves = np.array(moves)[: self.batch]
        first = np.maximum(self.length - moves[:, 0], np.maximum(self.reached - back, 0))
        first = np.minimum(first, self.length)
        count = np.minimum(np.minimum(moves[:, 1], num_new), S - first)
        if num_new == 1:
            count = np.minimum(1, S - first)
            first = np.where(count == 0, S - 1, first)
            count = np.ones_like(count)
        q = self.rng.normal(size=(self.batch, num_new, self.heads, D))
        k, v = self.rng.normal(size=(2, self.batch, num_new, *self.keys.shape[2:]))
        given = (*(np.float32(x) for x in (q, k, v)), self.cache)
        out, self.cache = attention(*given, np.int32(first), np.int32(count))
        out = np.asarray(out)
        for row, (at, n) in enumerate(zip(first, count, strict=True)):
            self.keys[row, at : at + n], self.values[row, at : at + n] = k[row, :n], v[row, :n]
            mask = np.array([visible(row, at + i) for i in range(n)]).reshape(n, S)
            expected = dense(q[row, :n], self.keys[row], self.values[row], mask)
            np.testing.assert_allclose(out[row, :n], expected, **CLOSE)
        assert np.isfinite(out).all()
        self.length = np.where(count > 0, first + count, self.length)
        self.reached = np.maximum(self.reached, self.length)


@jax.jit
def ring(q, k, v, cache, first, count, earliest):
    return ring_attention(q, k, v, cache, first, count, earliest)


@jax.jit
def window_ring(window, line, q, k, v, cache, first, count):
    positions = first[:, None] + jnp.arange(q.shape[1])[None]
    earliest = jnp.maximum(positions - window + 1, positions // line * line)
    return ring_attention(q, k, v, cache, first, count, earliest)


@given(
    st.sampled_from(  # rows, (heads, key/value heads), new positions, slots
        [
            (1, (1, 1), 1, 1),
            (3, (4, 2), 1, 6),
            (3, (3, 1), 4, 4),
            (3, (4, 2), 4, 8),
            (3, (2, 1), 4, 3),
        ]
    ),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from([S, 3]),
    STEPS,
    SEEDS,
)
@settings(max_examples=35)
def test_ring(shape, joined, back, line, steps, seed):
    """Windows of a ring less the positions that rows step back over, and lines that end earlier.

    Also of rings with fewer slots than new positions.
    """
    batch, heads, num_new, num_slots = shape
    back = min(back, num_slots - 1)
    window = num_slots - back

    def visible(row, position):
        seen = np.arange(S)
        from_line = seen >= position // line * line
        return (seen <= position) & (seen > position - window) & from_line

    rows = Rows(batch, *heads, num_slots, joined, seed)
    for moves in steps:
        rows.step(functools.partial(window_ring, window, line), moves, num_new, back, visible)


@pytest.mark.parametrize("num_new", [1, 4])
def test_a_position_may_be_read_again(num_new):
    """The same content changes no ring, and gives the same."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, num_new, 2, D)).astype(np.float32)
    rings = rng.normal(size=(2, 2, 2, 8, D)).astype(np.float32)
    first, count = np.int32([9, 3]), np.int32([num_new, 1])
    earliest = first[:, None] + np.arange(num_new) - 3
    once = ring(q, k, v, as_cache(*rings), first, count, earliest)
    again = ring(q, k, v, once[1], first, count, earliest)
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_stepping_back_is_as_never_having_gone_on():
    window, back = 5, 3
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 20, 2, D)).astype(np.float32)
    other = rng.normal(size=(2, 2, back, 2, D)).astype(np.float32)
    rings = as_cache(*np.zeros((2, 2, 2, window + back, D), np.float32))
    one = np.ones(2, np.int32)

    def read(rings, position, k, v):
        at = position * one
        earliest = at[:, None] - window + 1
        return ring(q[:, position : position + 1], k, v, rings, at, one, earliest)

    for position in range(10):
        _, rings = read(rings, position, *(x[:, position : position + 1] for x in (k, v)))
    gone_on = rings
    for i in range(back):
        _, gone_on = read(gone_on, 10 + i, other[0][:, i : i + 1], other[1][:, i : i + 1])
    for position in range(10, 20):
        kv = [x[:, position : position + 1] for x in (k, v)]
        expected, rings = read(rings, position, *kv)
        found, gone_on = read(gone_on, position, *kv)
        np.testing.assert_array_equal(found, expected)


@functools.partial(jax.jit, static_argnums=(0, 1))
def store(device, block, *inputs):
    with pytest.MonkeyPatch.context() as patch:  # formulated as on a device of this kind
        patch.setattr(platform, "platform", lambda: device)
        return store_attention(*inputs, block=block)


@given(
    st.sampled_from(  # rows, (heads, key/value heads), new positions, block
        [
            (3, (4, 2), 1, 4),
            (3, (3, 1), 4, 12),
            (3, (4, 2), 4, 4),
            (1, (1, 1), 4, 128),
        ]
    ),
    DEVICES,
    st.booleans(),
    STEPS,
    SEEDS,
)
@settings(max_examples=35)
def test_store(shape, device, joined, steps, seed):
    """Everything before is seen, in one block or several, wherever a row goes on."""
    batch, heads, num_new, block = shape
    rows = Rows(batch, *heads, S, joined, seed)
    for moves in steps:
        rows.step(
            functools.partial(store, device, block),
            moves,
            num_new,
            S,
            lambda row, position: np.arange(S) <= position,
        )


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_row_of_no_new_position_leaves_the_store_as_it_is(device):
    rng = np.random.default_rng(0)
    stores = rng.normal(size=(2, 2, 1, 8, D)).astype(np.float32)
    for num_new in (1, 3):
        q, k, v = rng.normal(size=(3, 2, num_new, 1, D)).astype(np.float32)
        args = q, k, v, as_cache(*stores), np.int32([5, 5]), np.int32([0, 1])
        _, after = store(device, 4, *args)
        for x, before in zip(after, stores, strict=True):
            np.testing.assert_array_equal(x[0], before[0])
            assert (np.asarray(x[1]) != before[1]).any(axis=(0, 2)).tolist() == [
                i == 5 for i in range(8)
            ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def span(device, block, *inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "platform", lambda: device)
        return span_attention(*inputs, block=block)


@given(
    st.sampled_from(HEADS),
    st.sampled_from([(1, 1, 16), (3, 2, 4)]),  # spans, queries of each, block
    DEVICES,
    st.booleans(),
    st.data(),
    SEEDS,
)
@settings(max_examples=35)
def test_spans(heads, sizes, device, joined, data, seed):
    num_spans, k, block = sizes
    edges = st.lists(st.integers(0, S), min_size=4 * num_spans, max_size=4 * num_spans)
    edges = np.array(data.draw(edges), np.int32).reshape(2, 2, num_spans)
    starts, ends = np.minimum(*edges), np.maximum(*edges)
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(2, num_spans, k, heads[0], D)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, heads[1], S, D)).astype(np.float32)
    out = np.asarray(span(device, block, q, as_cache(keys, values, joined), starts, ends))
    for row, i in np.ndindex(2, num_spans):
        seen = (np.arange(S) >= starts[row, i]) & (np.arange(S) < ends[row, i])
        mask = np.tile(seen, (k, 1))
        by_position = (np.swapaxes(x[row], 0, 1) for x in (keys, values))
        np.testing.assert_allclose(out[row, i], dense(q[row, i], *by_position, mask), **CLOSE)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_named_slots(heads, joined):
    """In any order, visible or not; where nothing is visible, 0."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, heads[0], D)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, heads[1], 7, D)).astype(np.float32)
    slots = rng.permuted(np.tile(np.arange(7), (2, 5, 1)), axis=-1)[..., :4].astype(np.int32)
    visible = rng.random(slots.shape) < 0.5
    visible[0, 0], visible[1, 2] = False, True
    out = np.asarray(jax.jit(slots_attention)(q, as_cache(keys, values, joined), slots, visible))
    mask = np.zeros((2, 5, 7), bool)
    np.put_along_axis(mask, slots, visible, axis=-1)
    for row in range(2):
        by_slot = (np.swapaxes(x[row], 0, 1) for x in (keys, values))
        np.testing.assert_allclose(out[row], dense(q[row], *by_slot, mask[row]), **CLOSE)
    assert (out[0, 0] == 0).all()


def cases(joined):
    """(attention, its inputs, the axes of each) with four query and two key/value heads."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    queries, of_cache = ("batch", None, "heads", None), ("batch", "heads", None, None)
    cache = as_cache(normal(4, 2, 8, D), normal(4, 2, 8, D), joined)
    caches = (of_cache,) * len(cache)
    first, count = np.int32([0, 7, 9, 30]), np.int32([3, 0, 2, 1])
    for num_new in (1, 3):
        qkv = [normal(4, num_new, h, D) for h in (4, 2, 2)]
        axes = [queries] * 3 + [caches] + [("batch",)] * 2
        earliest = first[:, None] + np.arange(num_new) - 4
        yield (
            ring_attention,
            [*qkv, cache, first, count, earliest],
            [*axes, ("batch", None)],
        )
        inputs = [*qkv, cache, first % 5, count]
        yield functools.partial(store_attention, block=4), inputs, axes
    starts = np.int32([[0, 3], [2, 2], [0, 0], [5, 1]])
    yield (
        functools.partial(span_attention, block=2),
        [normal(4, 2, 3, 4, D), cache, starts, starts + np.int32([0, 3])],
        [("batch", None, None, "heads", None), caches, ("batch", None), ("batch", None)],
    )
    slots = rng.integers(0, 8, (4, 3, 2)).astype(np.int32)
    yield (
        slots_attention,
        [normal(4, 3, 4, D), cache, slots, slots > 2],
        [queries, caches, ("batch", None, None), ("batch", None, None)],
    )


def place(x, names, mesh):
    if isinstance(x, tuple):
        return tuple(place(*pair, mesh) for pair in zip(x, names, strict=True))
    return jax.device_put(x, jax.NamedSharding(mesh, sharding.spec(*names)))


@pytest.mark.parametrize("attention, inputs, axes", [*cases(False), *cases(True)])
def test_rows_and_heads_over_devices(attention, inputs, axes, use_mesh):
    expected = jax.tree.leaves(jax.jit(attention)(*inputs))
    with use_mesh(1, 2, 2):
        mesh = jax.sharding.get_mesh()
        placed = [place(x, names, mesh) for x, names in zip(inputs, axes, strict=True)]
        found = jax.tree.leaves(jax.jit(attention)(*placed))
        # The result lies as the queries do, caches as caches.
        assert jax.typeof(found[0]).sharding.spec == sharding.spec(*axes[0])
        of_cache = sharding.spec("batch", "heads", None, None)
        assert all(jax.typeof(x).sharding.spec == of_cache for x in found[1:])
        found = [np.asarray(x) for x in found]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, **CLOSE)


@given(st.sampled_from(HEADS), st.sampled_from([1, 3]), SEEDS)
@settings(max_examples=12)
def test_some_rows_of_a_store_are_as_all_of_them(heads, num_new, seed):
    """The rows that are meant see and write what they do among all; no other changes."""
    rng, (heads, groups), batch = np.random.default_rng(seed), heads, 5
    rows = rng.permutation(batch)[:3].astype(np.int32)
    store = rng.normal(size=(2, batch, groups, S, D)).astype(np.float32)
    q = rng.normal(size=(batch, num_new, heads, D)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, num_new, groups, D)).astype(np.float32)
    first = rng.integers(0, S - num_new, batch).astype(np.int32)
    count = rng.integers(0, num_new + 1, batch).astype(np.int32)
    few = np.isin(np.arange(batch), rows)
    whole = jax.jit(store_attention)(q, k, v, tuple(store), first, np.where(few, count, 0))
    inputs = [x[rows] for x in (q, k, v)]
    some = jax.jit(lambda *x: store_attention(*x[:3], x[3], *x[4:6], rows=x[6]))(
        *inputs, tuple(store), first[rows], count[rows], rows
    )
    seen = count[rows] > 0
    np.testing.assert_allclose(some[0][seen], np.array(whole[0])[rows][seen], **CLOSE)
    for found, expected in zip(some[1], whole[1], strict=True):
        np.testing.assert_array_equal(found, expected)
    starts = rng.integers(0, S, (batch, 2)).astype(np.int32)
    ends = np.minimum(starts + rng.integers(0, 9, (batch, 2)).astype(np.int32), S)
    q = rng.normal(size=(batch, 2, 2, heads, D)).astype(np.float32)
    whole = jax.jit(span_attention)(q, tuple(store), starts, ends)
    some = jax.jit(lambda *x: span_attention(*x[:4], rows=x[4]))(
        q[rows], tuple(store), starts[rows], ends[rows], rows
    )
    np.testing.assert_allclose(some, np.array(whole)[rows], **CLOSE)
