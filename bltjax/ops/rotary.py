"""Rotary position embedding over interleaved pairs, the layout of the published weights."""

import jax
import jax.numpy as jnp


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
    cos, sin = (f(angles)[:, :, None] for f in (jnp.cos, jnp.sin))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
