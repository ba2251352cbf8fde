"""Matrix products of the layers: the sums of their gradients, and where these lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax import sharding
from bltjax.model.parameters import _project

AXES = [("heads", "embed"), ("embed", "ffn"), (None, "embed")]


def operands(length):
    """x [8, length, 16], weight [8, 16] and a gradient [8, length, 8], on the host."""
    rng = np.random.default_rng(0)
    x, gradient = rng.normal(1, 1, (8, length, 16)), rng.normal(1, 1, (8, length, 8))
    return (a.astype(np.float32) for a in (x, rng.normal(0, 1, (8, 16)), gradient))


def plain(axes, x, weight):
    split = axes[0] if axes[0] in ("heads", "ffn") else None
    whole = sharding.gather_weight(weight.astype(x.dtype))
    return jnp.einsum("bli,oi->blo", x, whole, out_sharding=sharding.spec("batch", None, split))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(project, axes, x, weight, gradient):
    """Result, gradient of x, gradient of the weight, laid out as in a model."""
    output, input_axis = (axis if axis in ("heads", "ffn") else None for axis in axes)
    weight = jax.sharding.reshard(weight, sharding.spec(*axes))
    x = jax.sharding.reshard(x, sharding.spec("batch", None, input_axis))
    gradient = jax.sharding.reshard(gradient, sharding.spec("batch", None, output))
    result, pull = jax.vjp(functools.partial(project, axes), x, weight)
    dx, dw = pull(gradient.astype(result.dtype))
    assert jax.typeof(dw) == jax.typeof(weight) and jax.typeof(dx) == jax.typeof(x)
    return result, dx, dw


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_in_float32_it_is_the_plain_product(axes, sizes, use_mesh):
    x, weight, gradient = operands(12)
    with use_mesh(*sizes):
        ours = jax.device_get(run(_project, axes, x, weight, gradient))
        expected = jax.device_get(run(plain, axes, x, weight, gradient))
    for a, b in zip(ours[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(ours[2], expected[2], rtol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_in_bfloat16_the_gradient_of_a_weight_is_summed_in_float32(sizes, use_mesh):
    """Over 4096 positions, within a chip and over chips."""
    x, weight, gradient = operands(512)
    x, gradient = (a.astype(jnp.bfloat16) for a in (x, gradient))
    with use_mesh(*sizes):
        result, dx, dw = run(_project, AXES[0], x, weight, gradient)
        assert (result.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
        of_jax = jax.device_get(run(plain, AXES[0], x, weight, gradient)[2])
    exact = np.einsum("blo,bli->oi", np.float64(gradient), np.float64(x))

    def error(found):
        return np.max(np.abs(found / exact - 1))

    assert error(jax.device_get(dw)) < 1e-5
    assert error(of_jax) > 1e-3  # what JAX derives is not enough
