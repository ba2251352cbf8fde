"""Rotary position embedding over interleaved pairs, the layout of the published weights."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from bltjax.ops import platform
from bltjax.ops.slots import on_shards

LANES = 128  # width of a TPU's registers
Factors = tuple[jax.Array, jax.Array]  # cosines and sines, float32


def rotary_factors(positions: jax.Array, head_width: int, theta: float) -> Factors:
    """Returns cosine and sine of position * theta^(-2i/D), [..., D/2] each (model.md#rotary).

    To be computed once for all layers of a stack: within a layer, XLA would compute them again for
    each row and head.
    """
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    frequencies = frequencies.reshape((1,) * positions.ndim + (-1,))
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def lay_out(factors: Factors, scale: float = 1.0) -> Factors:
    """Lays `rotary_factors` out as `apply_rotary` reads them, times a scale of what it returns.

    Once for all layers too: [1 or B, L, 1, D/2]; on TPUs [1 or B, L, 1, D], or [1 or B, 1, D, L]
    where positions lie along the lanes.
    """
    return tuple(_laid_out(f if f.ndim == 3 else f[None]) for f in (scale * f for f in factors))


def _laid_out(factor):
    if platform.platform() != "tpu":
        return factor[:, :, None]
    factor = jnp.repeat(factor, 2, axis=2)
    fills_lanes = factor.shape[2] % LANES == 0
    factor = factor[:, :, None] if fills_lanes else jnp.swapaxes(factor, 1, 2)[:, None]
    return jax.lax.optimization_barrier(factor)  # or XLA would repeat it in each layer again


@jax.custom_vjp
def apply_rotary(x: jax.Array, factors: Factors) -> jax.Array:
    """Turns the pairs (2i, 2i+1) of x by the angles of `factors`, in float32.

    Shapes: x [B, L, H, D], factors from `lay_out` -> [B, L, H, D] in x's dtype. The backward pass
    is the opposite turn, and keeps nothing of x.
    """
    if platform.platform() == "tpu":
        return on_shards(_turned_by_product, x, *factors)
    return _turned(x, *factors)


def _forward(x, factors):
    return apply_rotary(x, factors), factors


def _backward(factors, gradient):
    cos, sin = factors
    return apply_rotary(gradient, (cos, -sin)), None


apply_rotary.defvjp(_forward, _backward)


def _turned(x, cos, sin):
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _turned_by_product(x, cos, sin):
    """Does the same on TPUs, which reach every other number of a register by copying all of them.

    A product with a matrix of 0, 1 and -1, exact, gives each number the other one of its pair.
    Positions lie along the lanes where a head would not fill them.
    """
    if x.shape[-1] % LANES == 0:
        other = _product("blhe,de->blhd", x, _other_of_pairs(x))
        return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)
    matrix, x = _other_of_pairs(x), jnp.transpose(x, (0, 2, 3, 1))
    other = _product("de,bhel->bhdl", matrix, x)
    turned = (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)
    turned = with_layout_constraint(turned, Layout((0, 1, 2, 3)))
    return jnp.transpose(turned, (0, 3, 1, 2))


def _other_of_pairs(x):
    """Returns the matrix that maps the pairs (a, b) of x [..., D] to (-b, a), in x's dtype."""
    row, column = jnp.arange(x.shape[-1])[:, None], jnp.arange(x.shape[-1])[None]
    first = (row % 2 == 0) & (column == row + 1)
    second = (row % 2 == 1) & (column == row - 1)
    return second.astype(x.dtype) - first.astype(x.dtype)


def _product(letters, a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)
