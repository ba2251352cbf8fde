"""Reading and writing the slots of caches, at other places in each row.

Arrays may be sharded by rows, and by any axis but that of the slots.
"""

import math

import jax
import jax.numpy as jnp


def read_slots(cache: jax.Array, slots: jax.Array) -> jax.Array:
    """cache [B, ..., R, D], slots int32 [B, M], clipped -> [B, ..., M, D]."""
    return on_shards(jax.vmap(read_row), cache, slots)


def read_row(row: jax.Array, slots: jax.Array) -> jax.Array:
    """row [..., R, D], slots int32 [M], clipped -> [..., M, D]."""
    return row.at[..., slots, :].get(mode="clip", wrap_negative_indices=False)


def write_slots(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """The cache [B, ..., R, D] with new [B, ..., M, D] in slots int32 [B, M], none of them twice.

    Slots from R on are dropped; none may be negative.
    """
    return on_shards(write_rows, cache, new, slots)


def write_rows(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """`write_slots` on the rows of one device."""
    write = jax.vmap(lambda row, new, at: row.at[at].set(new, mode="drop"))
    # Heads are rows too: XLA makes of a scatter to a single slot something that copies the cache.
    groups = math.prod(cache.shape[1:-2])
    slots = jnp.repeat(slots, groups, axis=0)
    flat, new = (x.reshape(-1, *x.shape[-2:]) for x in (cache, new.astype(cache.dtype)))
    return write(flat, new, slots).reshape(cache.shape)


def read_positions(values: jax.Array, positions: jax.Array) -> jax.Array:
    """values [B, C], positions int32 [B, M], clipped -> [B, M]."""
    return read_slots(values[..., None], positions)[..., 0]


def write_positions(values: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """The values [B, C] with new [B, M] at positions int32 [B, M]; those from C on are dropped."""
    return write_slots(values[..., None], new[..., None], positions)[..., 0]


def on_shards(function, *arguments, like=0):
    """function of the rows and heads of each device, which see nothing of each other.

    like: the argument that the result is sharded as; of several results, one for each.
    """
    specs = tuple(jax.typeof(x).sharding.spec for x in arguments)
    out = tuple(specs[i] for i in like) if isinstance(like, tuple) else specs[like]
    return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)(*arguments)


def on_rows(function, *arguments):
    """function of the rows of each device; its results are sharded by rows, as the first argument.

    Arguments are arrays, or pytrees of arrays that all devices hold whole.
    """
    arguments = jax.tree.map(jnp.asarray, arguments)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments)
    rows = jax.P(jax.typeof(arguments[0]).sharding.spec[0])
    return jax.shard_map(function, in_specs=specs, out_specs=rows, check_vma=False)(*arguments)


def span(first: jax.Array, start: int, stop: int) -> jax.Array:
    """first int32 [...] plus start .. stop - 1 -> int32 [..., stop - start]."""
    offsets = jnp.arange(start, stop)
    return first[..., None] + offsets.reshape((1,) * first.ndim + offsets.shape)


def below(count: jax.Array, number: int) -> jax.Array:
    """Which of 0 .. number - 1 are below count int32 [...] -> bool [..., number]."""
    return span(jnp.zeros_like(count), 0, number) < count[..., None]
