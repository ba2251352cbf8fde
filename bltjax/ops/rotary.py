"""Rotary position embedding, on heads whose features are in split halves.

Published weights hold the two features of a pair side by side, and no processor likes to reach for
every other number: TPUs copied whole arrays for it. So the rows of the weights that make queries and
keys are put in another order where they are used. Scores, sums over a head's features, stay the same.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from bltjax.ops.heads import on_tpu


def in_halves(weight: jax.Array, head_width: int) -> jax.Array:
    """Orders the rows of each head 0, 2, .., 1, 3, ..: the first of all pairs, then the second.

    weight: [..., H*D, E], whose rows may be sharded by heads -> the same type.
    """
    *outer, rows, columns = weight.shape
    spec = jax.typeof(weight).sharding.spec
    *outer_spec, by_head, by_column = spec
    pairs = *outer, rows // head_width, head_width // 2, 2, columns
    pairs_spec = jax.P(*outer_spec, by_head, None, None, by_column)
    halves = jnp.swapaxes(jax.lax.reshape(weight, pairs, out_sharding=pairs_spec), -3, -2)
    return jax.lax.reshape(halves, weight.shape, out_sharding=spec)


def rotary_angles(positions: jax.Array, head_width: int, theta: float) -> jax.Array:
    """Returns position * theta^(-2i/D), float32 [..., D/2] (model.md#rotary)."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    frequencies = frequencies.reshape((1,) * positions.ndim + (-1,))
    return positions.astype(jnp.float32)[..., None] * frequencies


def apply_rotary(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + D/2) of x by the angles, in float32; see `in_halves`.

    Shapes: x [B, L, H, D], angles [L, D/2] or [B, L, D/2] -> [B, L, H, D] in x's dtype.
    """
    angles = angles if angles.ndim == 3 else angles[None]
    cos, sin = (f(angles) for f in (jnp.cos, jnp.sin))
    if not on_tpu():
        return _turned(x, cos[:, :, None], sin[:, :, None], axis=3)
    # Positions go along the 128 lanes, which halves of a head would not fill.
    cos, sin = (jnp.swapaxes(y, 1, 2)[:, None] for y in (cos, sin))
    turned = _turned(jnp.transpose(x, (0, 2, 3, 1)), cos, sin, axis=2)
    turned = with_layout_constraint(turned, Layout((0, 1, 2, 3)))
    return jnp.transpose(turned, (0, 3, 1, 2))


def _turned(x, cos, sin, axis):
    a, b = jnp.split(x.astype(jnp.float32), 2, axis)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis).astype(x.dtype)
