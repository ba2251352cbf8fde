"""Sums over the features of each head, and numbers spread over them, on flat features.

Arrays stay [..., H*D]. As [..., H, D] or [..., K, H] they would fill 64 or 16 of the 128 lanes of a
TPU's registers, and each step would copy them from one layout to another. There both are products
with a 0/1 matrix; elsewhere sums and broadcasts, which XLA fuses with what they read.

Letters: H heads, D head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from bltjax.ops import platform


def sum_heads(x: jax.Array, num_heads: int, exact: bool = True) -> jax.Array:
    """Sums float32 x [..., H*D] over each head's features -> [..., H].

    exact: to float32. Otherwise TPUs add numbers of 16 bits and more, for products of bfloat16.
    """
    if platform.platform() != "tpu":
        return x.reshape(*x.shape[:-1], num_heads, -1).sum(axis=-1)
    return _product("...f,hf->...h", x, num_heads, x.shape[-1], exact)


def spread_heads(x: jax.Array, width: int, exact: bool = True) -> jax.Array:
    """Repeats each number of float32 x [..., H] for its head's D features -> [..., H*D]."""
    if platform.platform() != "tpu":
        return jnp.repeat(x, width, axis=-1)
    return _product("...h,hf->...f", x, x.shape[-1], x.shape[-1] * width, exact)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def weigh_heads(weights: jax.Array, x: jax.Array, width: int, exact: bool = True) -> jax.Array:
    """Multiplies x [..., H*D] by a float32 weight [..., H] of each head -> float32 [..., H*D].

    The backward pass spreads the weights again: as an array that both passes read they would be
    written to memory, and each of its numbers read twice.
    """
    return spread_heads(weights, width, exact) * x.astype(jnp.float32)


def _weigh_backward(width, exact, saved, gradient):
    weights, x = saved
    num_heads = weights.shape[-1]
    to_weights = sum_heads(gradient * x.astype(jnp.float32), num_heads, exact)
    weights = jax.lax.optimization_barrier(weights)
    return to_weights, (spread_heads(weights, width, exact) * gradient).astype(x.dtype)


weigh_heads.defvjp(
    lambda weights, x, *static: (weigh_heads(weights, x, *static), (weights, x)), _weigh_backward
)


def rows_in_memory(x: jax.Array) -> jax.Array:
    """Returns x [B, L, F], whose rows lie in one piece on TPUs, its gradient's too.

    Row gathers and sums write and read them so. Beside products XLA prefers columns, and copies.
    """
    return with_layout_constraint(x, Layout((0, 1, 2))) if platform.platform() == "tpu" else x


def _product(letters, x, num_heads, features, exact):
    member = jnp.arange(features)[None] // (features // num_heads) == jnp.arange(num_heads)[:, None]
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.HIGH
    return jnp.einsum(letters, x, member.astype(jnp.float32), precision=precision)
