"""Cross-entropy and its gradient against JAX's own derivative and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.ops.cross_entropy import nats_and_log_sums, next_byte_nats

B, L, V = 2, 5, 260


def plain(logits, targets):
    """The same in JAX's own operations, whose derivative is JAX's own."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_sums = jax.nn.logsumexp(logits, axis=-1)
    return log_sums - chosen, log_sums


def case(seed, scale, dtype="float32"):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(scale * rng.normal(size=(B, L, V)), dtype)
    weights = rng.integers(0, 2, (B, L)) * rng.random((B, L))  # a mask, and weights
    targets = jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)
    return logits, targets, jnp.asarray(weights, jnp.float32)


def loss(function, logits, targets, weights, z_loss=0.1):
    nats, log_sums = function(logits, targets)
    return jnp.sum(nats * weights) + z_loss * jnp.sum(weights * log_sums**2)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_values_and_gradients(seed, scale, dtype):
    """Within float32 rounding of float64, and for bfloat16 logits within that of their gradient."""
    logits, targets, weights = case(seed, scale, dtype)
    for result, expected in zip(
        nats_and_log_sums(logits, targets), plain(logits, targets), strict=True
    ):
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, expected)
    got = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)(
        nats_and_log_sums, logits, targets, weights
    )
    assert got.dtype == logits.dtype
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(logits, np.float64))
        exact = jax.grad(loss, argnums=1)(plain, wide, targets, weights.astype(jnp.float64))
    unit = 2.0**-7 if dtype == "bfloat16" else 2.0**-19
    room = unit * np.abs(np.asarray(exact)) + 2.0**-20 * (1 + scale)
    assert (np.abs(np.asarray(got, np.float64) - np.asarray(exact)) <= room).all()
    # JAX's own derivative of the float32 program.
    own = jax.grad(loss, argnums=1)(plain, logits, targets, weights)
    np.testing.assert_allclose(
        np.asarray(got, np.float32),
        np.asarray(own, np.float32),
        atol=2.0**-20 * (1 + scale),
        rtol=unit,
    )


def test_backward_pass_is_elementwise():
    """No scatter, and no float32 array of zeros to scatter into."""
    logits, targets, weights = case(0, 1.0)
    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    for function, expected in ((nats_and_log_sums, False), (plain, True)):
        text = gradient.lower(function, logits, targets, weights).as_text()
        assert ("scatter" in text) == expected


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 2)])
def test_on_a_mesh(use_mesh, sizes):
    logits, targets, weights = case(1, 3.0)
    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    expected = np.asarray(gradient(nats_and_log_sums, logits, targets, weights))
    host = [np.asarray(x) for x in (logits, targets, weights)]
    with use_mesh(*sizes):
        got = gradient(nats_and_log_sums, *sharding.shard_rows(host))
        assert jax.typeof(got).sharding.spec == sharding.batch_spec(3)
        np.testing.assert_allclose(got, expected, atol=1e-6)
        nats = next_byte_nats(*sharding.shard_rows(host[:2]))
    np.testing.assert_allclose(nats, plain(logits, targets)[0], rtol=1e-6)
