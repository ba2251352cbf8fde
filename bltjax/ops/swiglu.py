"""The gate of a feed-forward layer: silu(a) * b (SwiGLU, Shazeer 2020)."""

import jax
import jax.numpy as jnp

from bltjax.ops import platform


@jax.custom_vjp
def swiglu(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns silu(a) * b, computed in float32: a, b [...] -> [...] in their dtype.

    The backward pass keeps only a and b, and each of its results ends in a division. That saves a
    fifth of a layer's time on CPUs: XLA computes a cheap operation again for every matrix product
    that reads its result, but the result of a division only once.
    """
    return _forward(a, b)[0]


def _forward(a, b):
    a32, b32 = a.astype(jnp.float32), b.astype(jnp.float32)
    if platform.platform() == "tpu":
        return (a32 * b32 * jax.nn.sigmoid(a32)).astype(a.dtype), (a, b)
    return (a32 * b32 / (1 + jnp.exp(-a32))).astype(a.dtype), (a, b)


def _backward(saved, gradient):
    a, b, gradient = (x.astype(jnp.float32) for x in (*saved, gradient))
    if platform.platform() == "tpu":
        sigmoid = jax.nn.sigmoid(a)
        da, db = gradient * b * sigmoid * (1 + a - a * sigmoid), gradient * a * sigmoid
    else:
        inverse = 1 + jnp.exp(-a)  # of sigmoid(a)
        da, db = gradient * b * (1 + a - a / inverse) / inverse, gradient * a / inverse
    return da.astype(saved[0].dtype), db.astype(saved[1].dtype)


swiglu.defvjp(_forward, _backward)
