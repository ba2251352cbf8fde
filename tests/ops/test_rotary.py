"""Rotary embedding as multiplication by complex numbers on interleaved pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.ops.rotary import apply_rotary, lay_out, rotary_factors, scaled

B, L, H, D = 2, 33, 3, 8


def rotate(x, theta):
    return apply_rotary(x, lay_out(rotary_factors(jnp.arange(x.shape[1]), x.shape[3], theta)))


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_against_complex_numbers(theta):
    """model.md#rotary: pairs (2i, 2i+1), frequency theta^(-2i/D)."""
    x = np.random.default_rng(0).normal(size=(B, L, H, D)).astype(np.float32)
    turns = np.exp(1j * np.arange(L)[:, None] * theta ** (-np.arange(0, D, 2) / D))
    expected = (x[..., ::2] + 1j * x[..., 1::2]) * turns[:, None]
    result = np.asarray(jax.jit(rotate, static_argnums=1)(x, theta))
    np.testing.assert_allclose(result[..., ::2], expected.real, atol=1e-5)
    np.testing.assert_allclose(result[..., 1::2], expected.imag, atol=1e-5)


def test_scores_depend_on_distance_only():
    """The rotation of position s and t changes a score by s - t alone."""
    q, k = np.random.default_rng(1).normal(size=(2, D))
    q, k = (rotate(jnp.broadcast_to(x.astype(np.float32), (1, L, 1, D)), 100.0) for x in (q, k))
    scores = np.einsum("td,sd->ts", q[0, :, 0], k[0, :, 0])
    for distance in range(-L + 1, L):
        np.testing.assert_allclose(np.ptp(np.diagonal(scores, distance)), 0, atol=2e-5)


def test_computed_in_float32_whatever_the_input():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(B, L, H, D)), jnp.bfloat16)
    result = rotate(x, 10_000.0)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        result, rotate(x.astype(jnp.float32), 10_000.0).astype("bfloat16")
    )


def test_gradient_is_the_opposite_turn():
    """A rotation's transpose is its inverse; the gradient of x . c in x is c turned back."""
    rng = np.random.default_rng(3)
    x, cotangent = rng.normal(size=(2, B, L, H, D)).astype(np.float32)
    turned, pull_back = jax.vjp(lambda x: rotate(x, 10_000.0), x)
    (gradient,) = pull_back(cotangent)
    np.testing.assert_allclose(pull_back(turned)[0], x, atol=1e-5)
    step = rng.normal(size=x.shape).astype(np.float32)
    np.testing.assert_allclose(
        np.vdot(rotate(x + step, 10_000.0) - turned, cotangent), np.vdot(step, gradient), rtol=1e-3
    )


def test_long_waves_are_scaled():
    """As Llama 3.1 scales: from 4 waves within the original length on they stay."""
    factor, original = 8.0, 64
    frequencies = 10.0 ** -np.arange(0, 4, 0.25)
    found = scaled(frequencies, factor, original)
    wavelengths = 2 * np.pi / frequencies
    for wave, plain, now in zip(wavelengths, frequencies, found, strict=True):
        if wave < original / 4:
            assert now == plain
        elif wave > original:
            np.testing.assert_allclose(now, plain / factor)
        else:
            share = (original / wave - 1) / 3
            np.testing.assert_allclose(now, (1 - share) * plain / factor + share * plain)
    np.testing.assert_allclose(scaled(frequencies, factor, None), frequencies / factor)
    angles = np.arctan2(*reversed(rotary_factors(jnp.arange(2), 8, 100.0, 2.0)))[1]
    np.testing.assert_allclose(angles, 100.0 ** (-np.arange(4) / 4) / 2, rtol=1e-6)
