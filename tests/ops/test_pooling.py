"""Reductions over patches against loops, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.ops import platform, pooling
from bltjax.ops.pooling import (
    pool_patches,
    segment_max,
    segment_sum,
    take_patches,
    take_vectors,
)
from bltjax.ops.sorted_sums import scatter_sums, sorted_sums

B, L, P, E = 3, 19, 6, 4
REDUCTIONS = {"max": np.max, "min": np.min, "mean": np.mean}


@pytest.fixture(params=[scatter_sums, sorted_sums], autouse=True)
def form(request, monkeypatch):
    """Every test runs with the sums of CPUs and with those of accelerators."""
    monkeypatch.setattr(pooling, "scatter_sums", request.param)


def random_case(seed):
    """h in few distinct values, so that there are ties, and sorted ids that skip some patches."""
    rng = np.random.default_rng(seed)
    h = rng.integers(-3, 4, (B, L, E)).astype(np.float32)
    return h, np.sort(rng.integers(0, P, (B, L)), axis=1).astype(np.int32)


def oracle(h, ids, mode, cotangent):
    """Pooled values and the gradient of sum(pooled * cotangent), ties sharing it evenly."""
    pooled, grad = np.zeros((B, P, E)), np.zeros((B, L, E))
    for b, j, e in np.ndindex(B, P, E):
        inside = np.flatnonzero(ids[b] == j)
        if inside.size:
            values = h[b, inside, e]
            pooled[b, j, e] = REDUCTIONS[mode](values)
            chosen = inside if mode == "mean" else inside[values == pooled[b, j, e]]
            grad[b, chosen, e] += cotangent[b, j, e] / chosen.size
    return pooled, grad


@pytest.mark.parametrize("mode", REDUCTIONS)
def test_pool_patches(mode):
    """model.md#pooling: 0 and no gradient for empty patches; equal extremes share it evenly."""

    @jax.jit
    def pool(h, ids, cotangent):
        pooled, pullback = jax.vjp(lambda h: pool_patches(h, ids, P, mode), h)
        return pooled, pullback(cotangent)[0]

    for seed in range(20):
        h, ids = random_case(seed)
        cotangent = np.random.default_rng(seed).normal(size=(B, P, E)).astype(np.float32)
        for result, expected in zip(
            pool(h, ids, cotangent), oracle(h, ids, mode, cotangent), strict=True
        ):
            np.testing.assert_allclose(result, expected, atol=1e-6)


def test_ties_share_the_gradient():
    """Two of three bytes hold the maximum 2, so each gets half."""
    h = jnp.array([2.0, 2.0, 1.0]).reshape(1, 3, 1)
    grad = jax.grad(lambda h: pool_patches(h, jnp.zeros((1, 3), jnp.int32), 2, "max").sum())(h)
    assert grad.ravel().tolist() == [0.5, 0.5, 0.0]


def test_ids_outside_are_left_out():
    ids = jnp.array([[-1, -1, 0, 2, 3, 9]])
    x = jnp.arange(1.0, 7.0).reshape(1, 6, 1)
    assert segment_sum(x, ids, 3).ravel().tolist() == [3, 0, 4]
    assert segment_max(x, ids, 3).ravel().tolist() == [3, -np.inf, 4]


def test_take_patches_clips():
    x = jnp.arange(3.0).reshape(1, 3, 1)
    assert take_patches(x, jnp.array([[-5, -1, 0, 1, 2, 3, 9]])).ravel().tolist() == [
        0,
        0,
        0,
        1,
        2,
        2,
        2,
    ]


def test_take_is_the_transpose_of_sum():
    """<take(x), y> = <x, sum(y)>: the gradient of one is the other."""
    rng = np.random.default_rng(0)
    _, ids = random_case(0)
    x, y = rng.normal(size=(B, P, E)), rng.normal(size=(B, L, E))
    _, pullback = jax.vjp(functools.partial(take_patches, ids=ids), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(
        pullback(jnp.asarray(y, jnp.float32))[0],
        segment_sum(jnp.asarray(y, jnp.float32), ids, P),
        atol=1e-5,
    )


@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
def test_vectors_are_taken_as_one_row(device, monkeypatch):
    """As a split of `take_patches`, whatever joins the gradients."""
    rng = np.random.default_rng(1)
    _, ids = random_case(1)
    ids = ids - 1
    x, *cotangents = (jnp.asarray(rng.normal(size=(B, n, E)), jnp.float32) for n in (P, L, L))

    def plain(x):
        return jnp.split(take_patches(x, ids), 2, axis=-1)

    cotangents = [y[..., : E // 2] for y in cotangents]
    expected, pull_back = jax.vjp(plain, x)
    monkeypatch.setattr(platform, "platform", lambda: device)
    taken, pull_back_vectors = jax.vjp(lambda x: take_vectors(x, ids, 2), x)
    for one, other in zip(taken, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    gradient = pull_back_vectors(cotangents)[0]
    np.testing.assert_allclose(gradient, pull_back(cotangents)[0], atol=1e-5)


def test_mean_of_a_long_patch_in_half_precision():
    """bfloat16 cannot count past 256; sums and counts are taken in float32."""
    h = jnp.concatenate([jnp.zeros((1, 300, 1)), jnp.ones((1, 300, 1))], axis=1)
    mean = pool_patches(h.astype(jnp.bfloat16), jnp.zeros((1, 600), jnp.int32), 1, "mean")
    assert mean.dtype == jnp.bfloat16 and float(mean[0, 0, 0]) == 0.5


def test_gradients_in_half_precision_are_float32_sums_rounded_once():
    """300 ones and a half: bfloat16 would stop at 256, and lose the half."""
    ids = jnp.concatenate([jnp.full((1, 300), -1), jnp.full((1, 301), 2)], axis=1)
    x = jnp.ones((1, 2, 1), jnp.bfloat16)  # ids -1 and 2 are clipped to its two rows
    _, pullback = jax.vjp(lambda x: take_patches(x, ids), x)
    ones = jnp.ones((1, 601, 1), jnp.bfloat16).at[0, -1].set(4)
    gradient = pullback(ones)[0]
    assert gradient.dtype == jnp.bfloat16 and gradient.ravel().tolist() == [300, 304]


def test_many_ties_in_half_precision():
    """512 bytes share a gradient of 512, each gets 1; bfloat16 would count them to 256."""
    h = jnp.ones((1, 600, 1), jnp.bfloat16).at[0, :88].set(0)
    ids = jnp.zeros((1, 600), jnp.int32)
    _, pullback = jax.vjp(lambda h: segment_max(h, ids, 1), h)
    gradient = pullback(jnp.full((1, 1, 1), 512, jnp.bfloat16))[0].ravel().tolist()
    assert gradient == [0] * 88 + [1] * 512


def test_gradients_of_sums_skip_ids_outside():
    ids = jnp.array([[-1, 0, 0, 2, 3, 9]])
    _, pullback = jax.vjp(lambda x: segment_sum(x, ids, 3), jnp.zeros((1, 6, 1)))
    assert pullback(jnp.array([5.0, 6, 7]).reshape(1, 3, 1))[0].ravel().tolist() == [
        0,
        5,
        5,
        7,
        0,
        0,
    ]
    _, pullback = jax.vjp(lambda x: segment_max(x, ids, 3), jnp.zeros((1, 6, 1)))
    found = pullback(jnp.array([4.0, 6, 7]).reshape(1, 3, 1))[0].ravel().tolist()
    assert found == [0, 2, 2, 7, 0, 0]
