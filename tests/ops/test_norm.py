"""RMS normalisation against float64, and its single rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.ops.norm import rms_norm

EPS = 1e-5
norm = jax.jit(rms_norm, static_argnums=2)


def random_case(seed, shape=(4, 50, 64)):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10 ** rng.uniform(-3, 3, (*shape[:-1], 1))
    return x.astype(np.float32), rng.normal(1, 0.3, shape[-1]).astype(np.float32)


def test_against_float64():
    for seed in range(5):
        x, weight = random_case(seed)
        x64 = x.astype(np.float64)
        expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + EPS) * weight
        np.testing.assert_allclose(norm(x, weight, EPS), expected, rtol=2e-6)


def test_bfloat16_is_rounded_once():
    """model.md#rmsnorm: float32 throughout, one rounding; a second would move many outputs."""
    x, weight = random_case(0)
    x = jnp.asarray(x, jnp.bfloat16)
    result = norm(x, weight, EPS)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        result, norm(x.astype(jnp.float32), weight, EPS).astype("bfloat16")
    )
    x64 = np.asarray(x, np.float64)
    normalised = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + EPS)
    once = jnp.asarray(normalised * weight, jnp.bfloat16)
    twice = jnp.asarray(
        jnp.asarray(normalised, jnp.bfloat16).astype(jnp.float32) * weight[None, None], jnp.bfloat16
    )
    assert np.mean(result == once) > 0.999
    assert np.mean(result == twice) < 0.9


@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_gradients_are_those_of_the_formula(dtype, error):
    """Of each row, beside its largest: rows differ a millionfold."""
    x, weight = random_case(1, (3, 20, 32))
    cotangent = np.random.default_rng(2).normal(size=x.shape)
    x, cotangent = jnp.asarray(x, dtype), jnp.asarray(cotangent, dtype)

    def formula(x, weight):
        mean = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean + EPS) * weight[None, None]

    _, exact = jax.vjp(formula, x.astype(jnp.float32), weight)
    _, pull_back = jax.vjp(lambda x, weight: rms_norm(x, weight, EPS), x, weight)
    pairs = zip(pull_back(cotangent), exact(cotangent.astype(jnp.float32)), strict=True)
    for result, value in pairs:
        largest = np.abs(value).max(axis=-1, keepdims=True)
        assert (np.abs(result.astype(jnp.float32) - value) <= error * largest).all()
    assert pull_back(cotangent)[0].dtype == dtype


def test_zeros_stay_zero_and_have_a_gradient():
    value, grad = jax.value_and_grad(lambda x: rms_norm(x, jnp.ones(8), EPS).sum())(
        jnp.zeros((2, 8))
    )
    assert value == 0
    assert np.isfinite(grad).all()
