"""Reductions over patches against loops, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.ops.pooling import pool_patches, segment_max, segment_sum, take_patches

B, L, P, E = 3, 19, 6, 4
REDUCTIONS = {"max": np.max, "min": np.min, "mean": np.mean}


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


def test_mean_of_a_long_patch_in_half_precision():
    """bfloat16 cannot count past 256; sums and counts are taken in float32."""
    h = jnp.concatenate([jnp.zeros((1, 300, 1)), jnp.ones((1, 300, 1))], axis=1)
    mean = pool_patches(h.astype(jnp.bfloat16), jnp.zeros((1, 600), jnp.int32), 1, "mean")
    assert mean.dtype == jnp.bfloat16 and float(mean[0, 0, 0]) == 0.5
