"""Updates of the hash tables whose cost follows the rows that a batch reads, not all there are.

A step takes the rows that its n-grams name out of the tables and out of Adam's moments, trains as
if they were the tables, and puts them back in place: no gradient of a table's size exists. What
dense updates would have done to a row meanwhile is made up when it is next read (`catch_up`): its
moments fade, and go on moving it. Without that a rare row moves by a thirteenth of what it should.
"""

import functools

import jax
import jax.numpy as jnp

from bltjax.config import TrainingConfig
from bltjax.ops.hashing import ngram_hash_ids
from bltjax.ops.row_exchange import number_rows
from bltjax.training.optimizer import HASH_TABLES, learning_rate
from bltjax.training.state import TrainState

POINTS = 8  # of the updates that a row missed, for averages of what changes slowly


def find_rows(hashing, tokens, tables):
    """The rows of tables [T, rows, E] that the n-grams of tokens [B, L] read, each named once.

    hashing: HashConfig. Returns ids int32 [U] into the rows of all tables, U = B * L * T, and
    places int32 [B, L, T] in ids. An id that is used by no place is beyond the last row.
    """
    hashed = ngram_hash_ids(tokens, hashing.sizes, hashing.num_functions, hashing.vocab)
    num_tables, rows, _ = tables.shape
    ids = number_rows(hashed, rows).reshape(-1)
    # Of those who read a row the last stands for all: cheaper than to sort them.
    order = jax.lax.iota(jnp.int32, ids.size)
    places = jnp.zeros(num_tables * rows, jnp.int32).at[ids].max(order)[ids]
    ids = jnp.where(places == order, ids, num_tables * rows + order)
    return ids, places.reshape(hashed.shape)


def take_rows(state: TrainState, ids) -> TrainState:
    """The state with the rows `ids` [U, E] for tables; zeros for ids beyond the last."""

    def take(_, x):
        return _flat(x).at[ids].get(mode="fill", fill_value=0, unique_indices=True)

    return _map_tables(take, state)


def put_rows(state: TrainState, rows: TrainState, ids) -> TrainState:
    """`rows`, with the tables of `state` for its rows, which are written into them."""

    def put(_, x, new):
        written = _flat(x).at[ids].set(new, mode="drop", unique_indices=True)
        return written.reshape(x.shape)

    return _map_tables(put, state, rows)


def sum_rows(rows, places, dtype):
    """Sum of rows [U, E] over the last axis of places [B, L, T] -> [B, L, E] in `dtype`.

    Rounded and added up as whole tables are.
    """
    columns = (rows[places[..., t]] for t in range(places.shape[-1]))
    return sum(column.astype(dtype).astype(jnp.float32) for column in columns).astype(dtype)


def catch_up(config: TrainingConfig, state: TrainState) -> TrainState:
    """The state after the updates that its rows, or tables, have missed, all with gradient 0.

    Moments fade evenly, so that the motion of a row is a geometric series. A single update is made
    up exactly; of many, the learning rate and Adam's correction are averaged over a few, and
    epsilon is taken to fade with the moments.
    """
    optimizer = config.optimizer
    if HASH_TABLES not in state.params or optimizer.hash_rate == 0:  # frozen: nothing is held
        return state
    held = {}
    _map_tables(lambda kind, x: held.setdefault(kind, x), state)
    mu, nu = (held[kind].astype(jnp.float32) for kind in ("mu", "nu"))
    had, beta1, beta2 = held["counts"], optimizer.beta1, optimizer.beta2
    missed = (state.health.updates - had).astype(jnp.float32)
    ratio = beta1 / beta2**0.5

    def rate(step):
        return optimizer.hash_rate * learning_rate(optimizer, step, config.steps)

    def pace(step):
        correction = jnp.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))
        return rate(step) * correction

    def average(function, quantile):
        """Over missed updates: quantile tells the one at a share of the sum of their weights."""
        shares = [(i + 0.5) / POINTS for i in range(POINTS)]
        return sum(function(had + jnp.floor(quantile(share))) for share in shares) / POINTS

    pace_of_row = average(
        pace, lambda share: jnp.log1p(-share * (1 - ratio**missed)) / jnp.log(ratio)
    )
    direction = beta1 * mu / (jnp.sqrt(beta2 * nu) + optimizer.epsilon)
    decay = optimizer.weight_decay if optimizer.decay_hash_tables else 0.0
    shrinking = average(lambda step: jnp.log1p(-decay * rate(step)), lambda share: share * missed)
    kept = jnp.exp(missed * shrinking)
    motion = pace_of_row * (kept - ratio**missed) / (jnp.exp(shrinking) - ratio)
    caught_up = dict(
        params=kept[..., None] * held["params"] - motion[..., None] * direction,
        mu=mu * (beta1**missed)[..., None],
        nu=nu * (beta2**missed)[..., None],
        counts=jnp.full_like(had, state.health.updates),
    )
    return _map_tables(lambda kind, x: caught_up[kind].astype(x.dtype), state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def settle(config: TrainingConfig, state: TrainState) -> TrainState:
    """`catch_up` of whole tables, when training is over; the old state's memory is reused."""
    return catch_up(config, state)


def _flat(x):
    return x.reshape(-1, *x.shape[2:])


def _map_tables(function, *states):
    """function(kind, *arrays) of what states hold of tables; all else is the last state's.

    kind: params, mu, nu, or counts.
    """

    def mapped(path, *leaves):
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        if HASH_TABLES not in names:
            return leaves[-1]
        return function(names[names.index(HASH_TABLES) - 1], *leaves)

    return jax.tree_util.tree_map_with_path(mapped, *states)
