"""Muon: the momentum of a matrix, made orthogonal (Jordan et al., 2024; Liu et al., 2502.16982).

All directions of a matrix learn at one pace, also those of small gradients. Adam leaves them
behind: a small byte latent transformer then learns its n-grams, and hardly uses its patches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec, reshard

MOMENTUM = 0.95
STEPS = 5  # of Newton-Schulz
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # all but small singular values end between 0.6 and 1.3
SIZE = 0.2  # root of the mean square of an update, about that of Adam's (Liu et al., section 2.2)


class Momenta(NamedTuple):
    """State of `scale_by_muon`."""

    momenta: optax.Updates


def scale_by_muon() -> optax.GradientTransformation:
    """Makes updates of matrices [..., out, in] orthogonal, with Nesterov momentum.

    Sized so that learning rates and weight decay are those of Adam. A matrix that chips share is
    gathered for it, one layer at a time.
    """

    def init(params):
        return Momenta(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params

        def mixed(momentum, gradient):
            return MOMENTUM * momentum + (1 - MOMENTUM) * gradient

        momenta = jax.tree.map(mixed, state.momenta, updates)
        return jax.tree.map(lambda m, g: _sized(mixed(m, g)), momenta, updates), Momenta(momenta)

    return optax.GradientTransformation(init, update)


def orthogonal(x: jax.Array) -> jax.Array:
    """Maps matrices [..., m, n] to about the nearest ones whose singular values are 1."""
    flat = x.shape[-2] <= x.shape[-1]
    x = x if flat else x.mT
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if flat else x.mT


def _sized(x: jax.Array) -> jax.Array:
    spec = jax.typeof(x).sharding.spec

    def of_matrices(x):
        return SIZE * max(x.shape[-2:]) ** 0.5 * orthogonal(reshard(x, PartitionSpec()))

    if x.ndim == 2 or not any(spec):
        return reshard(of_matrices(x), spec)
    # One layer after the other, so that one is gathered at a time.
    return jax.lax.map(lambda layer: reshard(of_matrices(layer), PartitionSpec(*spec[1:])), x)
