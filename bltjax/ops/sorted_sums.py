"""Sums of rows that share an id, in float32, where ids never decrease."""

import functools

import jax
import jax.numpy as jnp

from bltjax.ops.slots import on_shards

TILE = 128  # rows whose sums are one matrix product; a side of the matrix units


def scatter_sums(x: jax.Array, ids: jax.Array, num_ids: int) -> jax.Array:
    """Sums x [B, L, ...] by ids [B, L] -> float32 [B, num_ids, ...], one row after the other.

    Leaves out ids outside 0..num_ids-1; 0 for an id that is not there.
    """

    def of_row(x, ids):
        x = x.astype(jnp.float32)
        # A slice of x, spread, rather than a fresh array: it keeps x's sharding (of heads, say).
        zeros = jnp.broadcast_to(jnp.zeros_like(x[:1]), (num_ids, *x.shape[1:]))
        options = dict(indices_are_sorted=True, mode="drop", wrap_negative_indices=False)
        return zeros.at[ids].add(x, **options)

    return jax.vmap(of_row)(x, ids)


def sorted_sums(x: jax.Array, ids: jax.Array, num_ids: int) -> jax.Array:
    """Does `scatter_sums` by matrix products: a few kernels, and the same bits every time.

    A row is cut into tiles. A product of a tile with the 0/1 matrix of its equal ids gives, at
    each place, the sum of that place's id within the tile. An id takes the sum at its first place,
    and the sums of the tiles in which it goes on. One that is not finite spoils its whole tile.
    """
    return on_shards(functools.partial(_of_shard, num_ids), x, ids)


def _of_shard(num_ids, x, ids):
    rows, length, *rest = x.shape
    tiles = -(-length // TILE)
    padding = (0, 0), (0, tiles * TILE - length)
    x = jnp.pad(x.reshape(rows, length, -1), (*padding, (0, 0)))
    ids = jnp.pad(ids, padding, mode="edge")
    in_tiles = ids.reshape(rows, tiles, TILE)
    equal = in_tiles[..., :, None] == in_tiles[..., None, :]
    sums = _product("bnst,bntf->bnsf", equal, x.reshape(rows, tiles, TILE, -1))
    every = jnp.arange(num_ids, dtype=ids.dtype)[None, :, None]
    starts = _first_places(in_tiles, every)
    absent = _take(ids, jnp.minimum(starts, length - 1)) != every[..., 0]
    first = _take(sums.reshape(rows, tiles * TILE, -1), jnp.where(absent, tiles * TILE, starts))
    tile_starts = TILE * jnp.arange(tiles, dtype=jnp.int32)[None, None]
    goes_on = (in_tiles[:, None, :, 0] == every) & (tile_starts > starts[..., None])
    total = first + _product("bpn,bnf->bpf", goes_on, sums[:, :, 0])
    return total.reshape(rows, num_ids, *rest)


def _first_places(in_tiles, every):
    """Counts the smaller ids in_tiles [B, N, TILE] of each of `every` [1, P, 1] -> int32 [B, P].

    Whole tiles first, then within one: each of P ids meets N + TILE others, not all of them.
    """
    smaller = jnp.sum(in_tiles[:, None, :, -1] < every, axis=-1, dtype=jnp.int32)
    tile = jnp.minimum(smaller, in_tiles.shape[1] - 1)
    within = jnp.sum(_take(in_tiles, tile) < every, axis=-1, dtype=jnp.int32)
    return TILE * tile + within


def _product(letters, chosen, x):
    """Multiplies a 0/1 matrix by x: products are exact, sums float32."""
    options = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return jnp.einsum(letters, chosen.astype(x.dtype), x, **options)


def _take(x, places):
    """Takes places [B, P] of x [B, L, ...] -> [B, P, ...]; 0 past the end."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0))(x, places)
