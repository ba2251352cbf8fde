"""Rotary position embedding over interleaved pairs, the layout of the published weights."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from bltjax.ops import platform


def rotary_angles(positions: jax.Array, head_width: int, theta: float) -> jax.Array:
    """Returns position * theta^(-2i/D), float32 [..., D/2] (model.md#rotary)."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    frequencies = frequencies.reshape((1,) * positions.ndim + (-1,))
    return positions.astype(jnp.float32)[..., None] * frequencies


def apply_rotary(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (2i, 2i+1) of x by the angles, in float32.

    Shapes: x [B, L, H, D], angles [L, D/2] or [B, L, D/2] -> [B, L, H, D] in x's dtype.
    """
    angles = angles if angles.ndim == 3 else angles[None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    on_tpu = platform.platform() == "tpu"
    return (_turned_by_product if on_tpu else _turned)(x, cos, sin)


def _turned(x, cos, sin):
    cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _turned_by_product(x, cos, sin):
    """Does the same on TPUs, which reach every other number of a register by copying all of them.

    A product with a matrix of 0, 1 and -1, exact, gives each number the other one of its pair.
    Positions lie along the 128 lanes, which a head would not fill.
    """
    cos, sin = (jnp.repeat(jnp.swapaxes(y, 1, 2), 2, axis=1)[:, None] for y in (cos, sin))
    x = jnp.transpose(x, (0, 2, 3, 1))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    options = dict(precision=precision, preferred_element_type=jnp.float32)
    other = jnp.einsum("de,bhel->bhdl", _other_of_pair(x.shape[2], x.dtype), x, **options)
    turned = (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)
    turned = with_layout_constraint(turned, Layout((0, 1, 2, 3)))
    return jnp.transpose(turned, (0, 3, 1, 2))


def _other_of_pair(width: int, dtype) -> jax.Array:
    """Returns the matrix [D, D] that maps pairs (a, b) to (-b, a)."""
    row, column = jnp.arange(width)[:, None], jnp.arange(width)[None]
    first = (row % 2 == 0) & (column == row + 1)
    second = (row % 2 == 1) & (column == row - 1)
    return second.astype(dtype) - first.astype(dtype)
