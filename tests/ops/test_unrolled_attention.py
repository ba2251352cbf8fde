"""Tiles for GPUs, on CPUs: equal to a softmax under a dense mask, and without open loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.ops.kernels import unrolled_attention as kernel
from bltjax.ops.kernels.unrolled_attention import unrolled_attention
from tests.ops.reference import (
    assert_all_close,
    attention_inputs,
    dense_attention,
    visible,
    with_gradients,
)


def expected(q, k, v, segments, cotangent, window):
    return dense_attention(q, k, v, visible(segments, window), cotangent)


@pytest.fixture(params=[16, 2], ids=["written out", "loop"])
def unrolled(request, monkeypatch):
    """Distances between tiles that are written out; the others are a loop."""
    monkeypatch.setattr(kernel, "MOST_UNROLLED", request.param)


@pytest.mark.usefixtures("unrolled")
@pytest.mark.parametrize(
    ("window", "length", "heads", "kv_heads"),
    [
        (None, 77, 4, 2),
        (None, 64, 2, 2),
        (1, 50, 2, 1),
        (17, 77, 4, 2),
        (40, 90, 4, 4),
        (200, 77, 2, 1),
        (5, 3, 2, 2),
    ],
)
def test_tiles(window, length, heads, kv_heads):
    """Several tiles, each with several before it (model.md#masks)."""
    given = attention_inputs(np.random.default_rng(length), 2, length, heads, kv_heads)
    run = with_gradients(functools.partial(unrolled_attention, window=window, tile=16))
    assert_all_close(run(*given), expected(*given, window))


@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.one_of(st.none(), st.integers(1, 80)),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_any_shape(batch, length, heads, window, seed):
    given = attention_inputs(np.random.default_rng(seed), batch, length, *heads)
    run = with_gradients(functools.partial(unrolled_attention, window=window, tile=16))
    assert_all_close(run(*given), expected(*given, window))


def test_the_default_tile():
    given = attention_inputs(np.random.default_rng(0), 1, 700, 2, 1, num_ids=4)
    for window in (None, 300):
        run = with_gradients(functools.partial(unrolled_attention, window=window))
        assert_all_close(run(*given), expected(*given, window))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_few_rows_at_a_time(rows, monkeypatch):
    monkeypatch.setattr(kernel, "MOST_SCORES", rows * 2 * 48 * 16)
    given = attention_inputs(np.random.default_rng(rows), 6, 40, 2, 1)
    run = with_gradients(functools.partial(unrolled_attention, window=20, tile=16))
    assert_all_close(run(*given), expected(*given, 20))


@pytest.mark.parametrize("window", [None, 33])
def test_sums_are_in_float32(window):
    """Of bfloat16 inputs; a sum in bfloat16 would be off by several times as much."""
    given = attention_inputs(np.random.default_rng(3), 2, 300, 2, 2, width=32, num_ids=2)
    q, k, v, segments, cotangent = given
    q, k, v, cotangent = (jnp.asarray(x / 3, jnp.bfloat16) for x in (q, k, v, cotangent))
    run = with_gradients(functools.partial(unrolled_attention, window=window, tile=16))
    results = run(q, k, v, segments, cotangent)
    for x, value in zip(results, expected(q, k, v, segments, cotangent, window), strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.abs(np.asarray(x, np.float64) - value).max() < 8e-3 * np.abs(value).max()


def test_over_a_mesh(use_mesh):
    q, k, v, segments, cotangent = attention_inputs(np.random.default_rng(0), 8, 50, 4, 2)
    with use_mesh(2, 2, 2):
        heads_split = sharding.spec("batch", None, "heads", None)
        placed = [jax.reshard(x, heads_split) for x in (q, k, v, cotangent)]
        placed.insert(3, sharding.shard_rows(segments))
        found = with_gradients(functools.partial(unrolled_attention, window=20, tile=16))(*placed)
        assert jax.typeof(found[0]).sharding.spec == heads_split
        assert_all_close(found, expected(q, k, v, segments, cotangent, 20))


def equations(jaxpr):
    """All equations of a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(length, window):
    q = jax.ShapeDtypeStruct((2, length, 4, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    run = with_gradients(functools.partial(unrolled_attention, window=window))
    return list(equations(jax.make_jaxpr(run)(q, q, q, ids, q).jaxpr))


@pytest.mark.parametrize(("window", "length"), [(512, 8192), (None, 1792), (None, 8192)])
def test_no_loop_decides_its_own_end(window, length):
    """A GPU's host would wait for the end of each round."""
    names = [equation.primitive.name for equation in traced(length, window)]
    assert "dot_general" in names and "while" not in names
    if length < 8192 or window:
        assert "scan" not in names


@pytest.mark.parametrize("window", [None, 512])
def test_memory_is_linear(window):
    def largest(length):
        shapes = [v.aval.size for e in traced(length, window) for v in e.outvars]
        return max(shapes)

    assert largest(16384) <= 2.1 * largest(8192)
