"""Fingerprints of arrays: integers that change with any bit, on whatever mesh the arrays are."""

import hashlib
import json
import math

import jax
import jax.numpy as jnp


def leaf_fingerprints(tree) -> dict[str, int]:
    """A number below 2**32 for each array of a pytree, by its path.

    One pass on the devices; no array leaves its place, and every process gets all numbers. They
    are sums of integers, so that neither the mesh nor the number of devices or processes changes
    them. A single element that is changed is noticed for certain, anything else with a chance of
    1 - 2**-32.
    """
    leaves = named_leaves(tree)
    if not leaves:
        return {}
    numbers = jax.device_get(_fingerprints(list(leaves.values())))
    return dict(zip(leaves, map(int, numbers), strict=True))


def named_leaves(tree) -> dict:
    """Returns the leaves of a pytree by path, such as "params.norm.weight"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def digest(tree) -> str:
    """Returns 16 hexadecimal digits that tell pytrees of arrays apart, of leaves and paths."""
    return digest_of(leaf_fingerprints(tree))


def digest_of(fingerprints: dict[str, int]) -> str:
    """Returns the digest of a pytree of these fingerprints, by path."""
    text = json.dumps(fingerprints)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@jax.jit
def _fingerprints(leaves: list) -> jax.Array:
    return jnp.stack([_fingerprint(leaf) for leaf in leaves])


def _fingerprint(x: jax.Array) -> jax.Array:
    # For any one index this is one-to-one in the element, hence the certainty.
    return jnp.sum(_mix(_bits(x) ^ _mix(_indices(x))), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """Returns the bits of each element as a uint32."""
    if x.dtype == jnp.bool:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _indices(x: jax.Array) -> jax.Array:
    """Returns each element's index in the whole array, modulo 2**32, sharded as the array is."""
    places = jnp.uint32(0)
    for axis in range(x.ndim):
        along = jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding
        )
        places += along * jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
    return places


def _mix(x: jax.Array) -> jax.Array:
    """Mixes bits: one-to-one on uint32, each bit of the result depends on all (MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
