"""Attention of blocks: which rows see which, by loops over all pairs, and a softmax over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.ops.block_attention import block_attention, num_tiles, tile_length

B, M, K = 2, 2, 3
SHAPES = [(21, 4, 5), (16, 1, 7), (12, 3, 100), (9, 5, 1)]  # positions, tiles, window


@functools.cache
def attention(window):
    return jax.jit(functools.partial(block_attention, window=window))


def pairs(starts, segments, window):
    """bool [B, N, L + N]: whether a row of a block sees a position, and another row."""
    rows, length = segments.shape
    at = starts.reshape(rows, -1)
    number = at.shape[1] * K
    sees = np.zeros((rows, number, length + number), bool)
    for b in range(rows):
        for n in range(number):
            start = at[b, n // K]
            for p in range(length):
                near = start - window <= p < start
                sees[b, n, p] = near and segments[b, p] == segments[b, start - 1]
            for other in range(number):
                sees[b, n, length + other] = other // K == n // K
    return sees


def drawn_starts(draw, length, tiles):
    """Starts in the tiles that they belong to, in order."""
    size = tile_length(length, tiles)
    found = np.zeros((B, tiles, M), np.int32)
    for b in range(B):
        for s in range(tiles):
            first, last = min(s * size + 1, length), min((s + 1) * size, length)
            found[b, s] = sorted(draw(st.integers(first, last)) for _ in range(M))
    return found


@pytest.mark.parametrize("length, tiles, window", SHAPES)
@settings(max_examples=12)
@given(st.data())
def test_which_rows_see_which(length, tiles, window, data):
    starts = drawn_starts(data.draw, length, tiles)
    segments = np.sort([[data.draw(st.integers(0, 3)) for _ in range(length)] for _ in range(B)])
    number = tiles * M * K
    # All that is seen weighs the same, and what it holds is its own place.
    q = np.zeros((B, number, 1, length + number), np.float32)
    places = np.broadcast_to(
        np.eye(length + number, dtype=np.float32), (B,) + (length + number,) * 2
    )
    keys, values, k, v = (x[:, :, None] for x in (
        np.zeros((B, length, length + number), np.float32), places[:, :length],
        q[:, :, 0], places[:, length:],
    ))  # fmt: skip
    out = attention(window)(q, k, v, keys, values, starts, segments.astype(np.int32))
    sees = pairs(starts, segments, window)
    expected = sees / sees.sum(-1, keepdims=True)
    np.testing.assert_allclose(out[:, :, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype, atol", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_it_is_a_softmax_and_its_gradient_too(dtype, atol):
    (length, tiles, window), heads, groups, width = SHAPES[0], 4, 2, 6
    rng = np.random.default_rng(0)
    number = tiles * M * K
    shapes = [
        (number, heads),
        (number, groups),
        (number, groups),
        (length, groups),
        (length, groups),
    ]
    inputs = [rng.normal(0, 1, (B, *shape, width)).astype(np.float32) for shape in shapes]
    inputs = [jnp.asarray(x, dtype) for x in inputs]
    size = tile_length(length, tiles)
    starts = (
        np.sort(rng.integers(1, size + 1, (B, tiles, M)), -1) + np.arange(tiles)[:, None] * size
    )
    starts = np.minimum(starts, length).astype(np.int32)
    segments = np.sort(rng.integers(0, 3, (B, length))).astype(np.int32)
    sees, scale = pairs(starts, segments, window), width**-0.5

    def dense(q, k, v, keys, values):
        k, v = (jnp.repeat(jnp.concatenate(x, axis=1), heads // groups, axis=2)
                for x in ((keys, k), (values, v)))  # fmt: skip
        scores = jnp.einsum("bnhd,bshd->bhns", q, k) * scale
        weights = jax.nn.softmax(jnp.where(sees[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhns,bshd->bnhd", weights, v)

    def ours(*inputs):
        return block_attention(*inputs, starts, segments, window)

    def both(function, inputs):
        loss = lambda *x: jnp.sum(jnp.sin(function(*x).astype(jnp.float32)))  # noqa: E731
        return function(*inputs), *jax.grad(loss, argnums=range(5))(*inputs)

    found = jax.jit(functools.partial(both, ours))(inputs)
    expected = jax.jit(functools.partial(both, dense))([x.astype(jnp.float32) for x in inputs])
    for ours_, theirs in zip(found, expected, strict=True):
        assert ours_.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(ours_, np.float32), theirs, rtol=0, atol=atol * (1 + np.abs(theirs).max())
        )


def test_tiles_are_a_quarter_of_a_window_within_limits():
    assert [num_tiles(8192, w) for w in (512, 128, 320, 8192)] == [64, 128, 103, 64]
    assert num_tiles(10, 512) == 1 and tile_length(10, 1) == 10
    assert tile_length(21, 4) == 6
