"""Next-byte entropy: published values, limits, precision."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.patching.entropy import next_byte_entropy

GOLDEN = pathlib.Path(__file__).parents[1] / "golden_data" / "golden"


def test_published_entropies():
    golden = np.load(GOLDEN / "meta_entropy.npz")
    entropies = next_byte_entropy(jnp.asarray(golden["logits"]))
    np.testing.assert_allclose(entropies, golden["entropies"], rtol=2e-6)


def test_uniform_and_certain():
    logits = np.zeros((2, 260), np.float32)
    logits[1, 7] = 1e4
    np.testing.assert_allclose(next_byte_entropy(jnp.asarray(logits)), [np.log(260), 0], rtol=1e-6)


def test_impossible_bytes_add_nothing():
    logits = jnp.array([0.0, 0.0, -jnp.inf, -jnp.inf])
    assert float(next_byte_entropy(logits)) == pytest.approx(np.log(2))
    gradient = jax.grad(lambda x: next_byte_entropy(x))(jnp.array([1.0, 0.0, -1e6, -jnp.inf]))
    assert jnp.isfinite(gradient).all()


def test_is_float32_whatever_the_logits():
    logits = jax.random.normal(jax.random.key(0), (3, 260)).astype(jnp.bfloat16)
    entropies = next_byte_entropy(logits)
    assert entropies.dtype == jnp.float32
    x = np.asarray(logits, np.float64)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(entropies, -(p * np.log(p)).sum(-1), rtol=1e-5)


def test_large_logits_do_not_overflow():
    logits = jnp.array([[3e38, 3e38, -3e38]])
    np.testing.assert_allclose(next_byte_entropy(logits), [np.log(2)], rtol=1e-6)
