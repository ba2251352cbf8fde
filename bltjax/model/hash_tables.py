"""Hash tables of n-grams, whose rows are split over the chips."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec, reshard

from bltjax import sharding
from bltjax.config import HashConfig
from bltjax.model.parameters import truncated_normal
from bltjax.ops import row_exchange


class HashTables(nnx.Module):
    """The n-gram tables of all sizes and functions in one [T, rows, dim] (model.md#n-grams)."""

    def __init__(self, config: HashConfig, dim, *, key):
        shape, spec = (config.num_tables, config.rows, dim), sharding.table_spec(config.rows, dim)
        if config.initial_rows == "zeros":
            self.weight = nnx.Param(jnp.zeros(shape, jnp.float32, out_sharding=spec))
        else:
            self.weight = nnx.Param(truncated_normal(key, shape, dim**-0.5, spec))

    def __call__(self, ids, dtype):
        """Sums the rows `ids` int32 [B, L, T] of all tables, in float32 -> [B, L, dim]."""
        return lookup_sum(self.weight[...], ids, dtype)


def lookup_sum(tables: jax.Array, ids: jax.Array, dtype) -> jax.Array:
    """Sums the rows `ids` [B, L, T] of T tables [T, rows, E], laid out by `table_spec`.

    -> [B, L, E] in `dtype`. Chips ask the owners for the rows that they need, once for each, and
    the gradient goes back the same way: neither tables nor their gradients travel. Tables that
    every chip holds whole have their gradients added up over the chips.
    """
    _, owners, features = jax.typeof(tables).sharding.spec
    batch = sharding.batch_spec(3)

    def of_chip(tables, ids):
        if owners is not None:
            return row_exchange.exchange_lookup_sum(tables, ids, dtype, owners)
        if batch[0] is not None:
            tables = jax.lax.pcast(tables, batch[0], to="varying")
        return row_exchange.lookup_sum(tables, ids, dtype)

    out = PartitionSpec(batch[0], None, features)
    return reshard(jax.shard_map(of_chip, out_specs=out)(tables, ids), batch)
