"""What tokamax's kernels are given, with a dense softmax in their place."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.ops.kernels import mosaic_attention as kernel
from bltjax.ops.kernels.mosaic_attention import mosaic_attention
from tests.ops.reference import (
    assert_all_close,
    attention_inputs,
    dense_attention,
    visible,
    with_gradients,
)


def dense_kernel(q, k, v, starts, ends):
    """`_kernel`, of lengths that the kernels take."""
    assert q.shape[1] % 8 == 0 and k.shape[1] % 8 == 0
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    at = jnp.arange(k.shape[1])[None, None]
    seen = (at >= starts[..., None]) & (at < ends[None, :, None])
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights, v)


@pytest.fixture
def on_cpu(monkeypatch):
    """Small blocks too, so that short rows are folded."""
    monkeypatch.setattr(kernel, "_kernel", dense_kernel)
    monkeypatch.setattr(kernel, "_BLOCK", 8)


@pytest.mark.usefixtures("on_cpu")
@given(
    st.integers(1, 3),
    st.integers(1, 90),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.one_of(st.none(), st.integers(1, 30)),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_any_shape(batch, length, heads, window, seed):
    """Folded and not, of lengths that fill no block."""
    given = attention_inputs(np.random.default_rng(seed), batch, length, *heads)
    q, k, v, segments, cotangent = given
    found = with_gradients(functools.partial(mosaic_attention, window=window))(*given)
    assert_all_close(found, dense_attention(q, k, v, visible(segments, window), cotangent))


@pytest.mark.usefixtures("on_cpu")
def test_over_a_mesh(use_mesh):
    q, k, v, segments, cotangent = attention_inputs(np.random.default_rng(0), 8, 50, 4, 2)
    with use_mesh(2, 2, 2):
        heads_split = sharding.spec("batch", None, "heads", None)
        placed = [jax.reshard(x, heads_split) for x in (q, k, v, cotangent)]
        placed.insert(3, sharding.shard_rows(segments))
        found = with_gradients(functools.partial(mosaic_attention, window=10))(*placed)
        assert_all_close(found, dense_attention(q, k, v, visible(segments, 10), cotangent))


@pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="tokamax (Python 3.12) is not installed"
)
@pytest.mark.parametrize(("window", "length"), [(None, 300), (100, 700)])
def test_tokamax_reads_the_ranges_alike(window, length, monkeypatch):
    """Its plain form, under the mask that its kernels are given."""
    plain = functools.partial(kernel._kernel, implementation="xla")
    monkeypatch.setattr(kernel, "_kernel", plain)
    q, k, v, segments, cotangent = attention_inputs(np.random.default_rng(0), 2, length, 4, 2)
    run = with_gradients(functools.partial(mosaic_attention, window=window))
    expected = dense_attention(q, k, v, visible(segments, window), cotangent)
    assert_all_close(run(q, k, v, segments, cotangent), expected)
