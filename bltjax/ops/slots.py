"""Reads and writes cache slots, at different places in each row.

Arrays may be sharded by rows, and by any axis but that of the slots. `rows` int32 [R] names the
rows of a cache that are meant, in order; None: all. With it the cache is not sharded by rows.
"""

import math

import jax
import jax.numpy as jnp


def read_slots(cache: jax.Array, slots: jax.Array, rows: jax.Array | None = None) -> jax.Array:
    """Reads slots int32 [B, M], clipped, of a cache [B, ..., R, D] -> [B, ..., M, D]."""
    if rows is None:
        return on_shards(jax.vmap(read_row), cache, slots)
    return on_shards(read_some_rows, cache, slots, rows)


def read_some_rows(cache: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """Does `read_slots` on one device; slots int32 [R, M] of each of the rows."""
    lanes = jnp.arange(math.prod(cache.shape[1:-2]), dtype=rows.dtype)
    flat = cache.reshape(len(cache), -1, *cache.shape[-2:])
    at = rows[:, None, None], lanes[None, :, None], slots[:, None]
    read = flat.at[at].get(mode="clip", wrap_negative_indices=False)
    return read.reshape(len(rows), *cache.shape[1:-2], *read.shape[-2:])


def take_rows(values: jax.Array, rows: jax.Array | None) -> jax.Array:
    """Returns the rows [R, ...] of values [B, ...]."""
    return values if rows is None else on_shards(lambda x, at: x[at], values, rows)


def read_row(row: jax.Array, slots: jax.Array) -> jax.Array:
    """Reads slots int32 [M], clipped, of one row [..., R, D] -> [..., M, D]."""
    return row.at[..., slots, :].get(mode="clip", wrap_negative_indices=False)


def write_slots(
    cache: jax.Array, new: jax.Array, slots: jax.Array, rows: jax.Array | None = None
) -> jax.Array:
    """Writes new [B, ..., M, D] into slots int32 [B, M] of a cache [B, ..., R, D]; returns it.

    Drops slots from R on. No slot may be negative, or named twice in a row.
    """
    more = () if rows is None else (rows,)
    return on_shards(write_rows, cache, new, slots, *more)


def write_rows(
    cache: jax.Array, new: jax.Array, slots: jax.Array, rows: jax.Array | None = None
) -> jax.Array:
    """Does `write_slots` on the rows of one device."""
    if rows is not None:
        return _write_some_rows(cache, new, slots, rows)
    write = jax.vmap(lambda row, new, at: row.at[at].set(new, mode="drop"))
    # Heads become rows: XLA turns a scatter to a single slot into a copy of the whole cache.
    groups = math.prod(cache.shape[1:-2])
    slots = jnp.repeat(slots, groups, axis=0)
    flat, new = (x.reshape(-1, *x.shape[-2:]) for x in (cache, new.astype(cache.dtype)))
    return write(flat, new, slots).reshape(cache.shape)


def _write_some_rows(cache, new, slots, rows):
    num_slots, width = cache.shape[-2:]
    lanes = jnp.arange(math.prod(cache.shape[1:-2]), dtype=rows.dtype)
    lane = rows[:, None, None] * len(lanes) + lanes[None, :, None]
    at = jnp.where(slots < num_slots, slots, cache.size)[:, None] + lane * num_slots
    flat, new = cache.reshape(-1, width), new.astype(cache.dtype).reshape(-1, width)
    return flat.at[at.reshape(-1)].set(new, mode="drop").reshape(cache.shape)


def read_positions(values: jax.Array, positions: jax.Array) -> jax.Array:
    """Reads positions int32 [B, M], clipped, of values [B, C] -> [B, M]."""
    return read_slots(values[..., None], positions)[..., 0]


def write_positions(values: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes new [B, M] at positions int32 [B, M] of values [B, C]; drops those from C on."""
    return write_slots(values[..., None], new[..., None], positions)[..., 0]


def put_row(rows: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """Puts the first row of new [P, ...] in the place `slot` of rows [B, ...]; returns these."""
    spec = jax.typeof(rows).sharding.spec
    axis, rest = (spec[0], spec[1:]) if spec else (None, ())
    whole = jax.P(None, *rest)

    def put(rows, new, slot):
        first = 0 if axis is None else jax.lax.axis_index(axis) * len(rows)
        at = jnp.clip(slot - first, 0, len(rows) - 1)
        here = jax.lax.dynamic_slice_in_dim(rows, at, 1)
        new = jnp.where(slot - first == at, new[:1], here)
        return jax.lax.dynamic_update_slice_in_dim(rows, new, at, axis=0)

    specs = spec, whole, jax.P()
    new = jax.sharding.reshard(new, whole)
    return jax.shard_map(put, in_specs=specs, out_specs=spec, check_vma=False)(rows, new, slot)


def on_shards(function, *arguments, like=0):
    """Calls a function on the rows and heads of each device on its own.

    like: the number of the argument that the result is sharded as; for several results, a tuple.
    """
    specs = tuple(jax.typeof(x).sharding.spec for x in arguments)
    out = tuple(specs[i] for i in like) if isinstance(like, tuple) else specs[like]
    return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)(*arguments)


def on_rows(function, *arguments):
    """Calls a function on the rows of each device; shards its results as the first argument.

    Arguments are arrays sharded by rows, or pytrees of arrays that all devices hold whole.
    """
    arguments = jax.tree.map(jnp.asarray, arguments)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments)
    rows = jax.P(jax.typeof(arguments[0]).sharding.spec[0])
    return jax.shard_map(function, in_specs=specs, out_specs=rows, check_vma=False)(*arguments)


def span(first: jax.Array, start: int, stop: int) -> jax.Array:
    """Adds start .. stop - 1 to first int32 [...] -> int32 [..., stop - start]."""
    offsets = jnp.arange(start, stop, dtype=first.dtype)
    return first[..., None] + offsets.reshape((1,) * first.ndim + offsets.shape)


def below(count: jax.Array, number: int) -> jax.Array:
    """Tells which of 0 .. number - 1 are below count int32 [...] -> bool [..., number]."""
    return span(jnp.zeros_like(count), 0, number) < count[..., None]
