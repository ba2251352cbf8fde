"""Rotary position embedding over interleaved pairs, the layout of the published weights."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from bltjax.ops import platform
from bltjax.ops.slots import on_shards

Factors = tuple[jax.Array, jax.Array]  # cosines and sines, float32
LONG, SHORT = 1.0, 4.0  # waves in the original length: up to so many is long, from so many short


def rotary_factors(
    positions: jax.Array,
    head_width: int,
    theta: float,
    factor: float = 1.0,
    original_positions: int | None = None,
) -> Factors:
    """Returns cosine and sine of position * theta^(-2i/D), [..., D/2] each (model.md#rotary).

    To be computed once for all layers of a stack: within a layer, XLA would compute them again for
    each row and head. factor, original_positions: of `scaled`.
    """
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    if factor != 1.0:
        frequencies = scaled(frequencies, factor, original_positions)
    frequencies = frequencies.reshape((1,) * positions.ndim + (-1,))
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def scaled(frequencies, factor: float, original_positions: int | None):
    """Divides frequencies, in radians a position, by a factor; takes NumPy's and JAX's arrays.

    With a number of original positions it does so for waves of which at most LONG fit into them,
    and keeps those of which SHORT or more do; in between the two are mixed. Without, it does so
    for all.
    """
    if original_positions is None:
        return frequencies / factor
    waves = original_positions / (2 * math.pi) * frequencies
    kept = ((waves - LONG) / (SHORT - LONG)).clip(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def lay_out(factors: Factors, scale: float = 1.0) -> Factors:
    """Lays `rotary_factors` out as `apply_rotary` reads them, times a scale of what it returns.

    Once for all layers too: [1 or B, L, 1, D/2]; on TPUs, where positions lie along the lanes,
    [1 or B, 1, D, L].
    """
    return tuple(_laid_out(f if f.ndim == 3 else f[None]) for f in (scale * f for f in factors))


def _laid_out(factor):
    if platform.platform() != "tpu":
        return factor[:, :, None]
    # Behind a barrier, or XLA would repeat them in each layer again.
    return jax.lax.optimization_barrier(jnp.repeat(jnp.swapaxes(factor, 1, 2), 2, axis=1)[:, None])


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
    Positions lie along the 128 lanes, which a head would not fill; rows of heads that do take
    longer all the same, for what the compiler makes of the layers around.
    """
    x = jnp.transpose(x, (0, 2, 3, 1))
    turned = (x.astype(jnp.float32) * cos + _other_of_pairs(x) * sin).astype(x.dtype)
    turned = with_layout_constraint(turned, Layout((0, 1, 2, 3)))
    return jnp.transpose(turned, (0, 3, 1, 2))


def _other_of_pairs(x):
    """Maps the pairs (a, b) of x [B, H, D, L] to (-b, a), float32."""
    row, column = jnp.arange(x.shape[2])[:, None], jnp.arange(x.shape[2])[None]
    first = (row % 2 == 0) & (column == row + 1)
    second = (row % 2 == 1) & (column == row - 1)
    matrix = second.astype(x.dtype) - first.astype(x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    options = dict(precision=precision, preferred_element_type=jnp.float32)
    return jnp.einsum("de,bhel->bhdl", matrix, x, **options)
