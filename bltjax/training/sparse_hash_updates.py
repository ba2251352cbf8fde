"""Updates of the hash tables whose cost follows the rows that a batch reads.

A step takes the rows that its n-grams name out of the tables and out of Adam's moments, trains as
if they were the tables, and writes them back in place: no gradient of a table's size exists. Dense
updates would have moved a row also while no batch read it, by its fading moments; the row gets
these updates when it is next read (`apply_missed_updates`). Without them a rare row would move by a
thirteenth of what it should.
"""

import functools

import jax
import jax.numpy as jnp

from bltjax.config import TrainingConfig
from bltjax.ops.hashing import ngram_hash_ids
from bltjax.ops.row_exchange import number_rows
from bltjax.training.optimizer import HASH_TABLES, learning, learning_rate
from bltjax.training.state import TrainState

POINTS = 8  # missed updates at which slowly changing factors are sampled, to average them


def sparse_hash_step(
    model_config, config: TrainingConfig, gradients, update, further: tuple, state, batch
):
    """Makes a training step on the rows of the hash tables that the batch reads.

    gradients, update: functions of `step.make_train_step`; further: more arguments of the first.
    Returns the state and metrics.
    """
    tables = state.params[HASH_TABLES]["weight"]
    ids, places = find_rows(model_config, batch["tokens"], tables)

    def rows_of(state):
        return apply_missed_updates(config, take_rows(state, ids))

    sparse_batch = batch | dict(ngram_places=places)
    grads, sums = gradients(rows_of(state).params, sparse_batch, *further)
    # Rows of moments are read a second time, rather than held while gradients are computed.
    state, grads = jax.lax.optimization_barrier((state, grads))
    # XLA would read rows again where it writes them, out of copies of the tables (GPUs).
    rows = jax.lax.optimization_barrier(rows_of(state))
    new, metrics = update(rows, grads, sums, batch)
    if "skipped_in_a_row" in metrics:
        # A skipped step leaves out the missed updates too: ids past the last row write nothing.
        beyond = ids + tables.shape[0] * tables.shape[1]
        ids = jnp.where(new.health.skipped_in_a_row > 0, beyond, ids)
    return put_rows(state, new, ids), metrics


def find_rows(model_config, tokens, tables):
    """Finds the rows of tables [T, rows, E] that the n-grams of tokens [B, L] read, each once.

    Returns ids int32 [U] into the rows of all tables, U = B * L * T, and places int32 [B, L, T] in
    ids. An id that no place uses is beyond the last row.
    """
    own = model_config.hash
    hashed = ngram_hash_ids(
        tokens, own.sizes, own.num_functions, own.vocab, model_config.vocab_size
    )
    num_tables, rows, _ = tables.shape
    ids = number_rows(hashed, rows).reshape(-1)
    # The last reader of a row stands for all of its readers: cheaper than sorting.
    order = jax.lax.iota(jnp.int32, ids.size)
    places = jnp.zeros(num_tables * rows, jnp.int32).at[ids].max(order)[ids]
    ids = jnp.where(places == order, ids, num_tables * rows + order)
    return ids, places.reshape(hashed.shape)


def take_rows(state: TrainState, ids) -> TrainState:
    """Returns the state with the rows `ids` as its tables [U, E]; zeros for ids past the last."""

    def take(_, x):
        return _flat(x).at[ids].get(mode="fill", fill_value=0, unique_indices=True)

    return _map_tables(take, state)


def put_rows(state: TrainState, rows: TrainState, ids) -> TrainState:
    """Returns `rows` with whole tables: those of `state`, into which its rows are written."""

    def put(_, x, new):
        written = _flat(x).at[ids].set(new, mode="drop", unique_indices=True)
        return written.reshape(x.shape)

    return _map_tables(put, state, rows)


def sum_rows(rows, places, dtype):
    """Sums rows [U, E] over the last axis of places [B, L, T] -> [B, L, E] in `dtype`.

    Rounds and adds as a lookup in whole tables does.
    """
    columns = (rows[places[..., t]] for t in range(places.shape[-1]))
    return sum(column.astype(dtype).astype(jnp.float32) for column in columns).astype(dtype)


def apply_missed_updates(config: TrainingConfig, state: TrainState) -> TrainState:
    """Returns the state after the updates that its rows have missed, all with gradient 0.

    Moments fade by constant factors, so the motion of a row is a geometric series. One missed
    update is exact; for many, the learning rate and Adam's bias correction are averages over a few
    of them, and epsilon is taken to fade with the moments.
    """
    optimizer = config.optimizer
    if HASH_TABLES not in learning(optimizer, state.params):  # frozen: no moments
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
        """Weighted mean over missed updates; quantile(s): the one at a share s of all weight."""
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
    updated = dict(
        params=kept[..., None] * held["params"] - motion[..., None] * direction,
        mu=mu * (beta1**missed)[..., None],
        nu=nu * (beta2**missed)[..., None],
        counts=jnp.full_like(had, state.health.updates),
    )
    return _map_tables(lambda kind, x: updated[kind].astype(x.dtype), state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def finish_missed_updates(config: TrainingConfig, state: TrainState) -> TrainState:
    """Applies the missed updates of all rows, at the end of training; reuses the state's memory."""
    return apply_missed_updates(config, state)


def current_params(config: TrainingConfig, state: TrainState) -> dict:
    """Returns the parameters as they are to be used: no row of a table misses an update."""
    if config.optimizer.hash_updates != "touched":
        return state.params
    return _finished_params(config, state)


@functools.partial(jax.jit, static_argnums=0)
def _finished_params(config: TrainingConfig, state: TrainState) -> dict:
    return apply_missed_updates(config, state).params


def _flat(x):
    return x.reshape(-1, *x.shape[2:])


def _map_tables(function, *states):
    """Maps function(kind, *arrays) over the arrays of tables; all else is the last state's.

    kind: "params", "mu", "nu" or "counts".
    """

    def mapped(path, *leaves):
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        if HASH_TABLES not in names:
            return leaves[-1]
        return function(names[names.index(HASH_TABLES) - 1], *leaves)

    return jax.tree_util.tree_map_with_path(mapped, *states)
