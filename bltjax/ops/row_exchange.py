"""Sums of table rows, which all lie on one chip or are spread over many.

Functions on the arrays that one chip holds; `exchange_lookup_sum` belongs inside `jax.shard_map`.
Rows are rounded to the compute dtype first, so that sums have the same terms whether rows travelled
or not; sums, of gradients too, are in float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_ROWS = 2**31 - 1  # rows of all tables together that int32 can number
NOWHERE = MAX_ROWS  # number of a row or place that does not exist


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup_sum(tables, ids, dtype):
    """Sums over T tables their rows `ids`, which are all on this chip.

    tables float32 [T, R, E], ids int32 [b, L, T] in 0..R-1 -> [b, L, E] in `dtype`. Raises
    ValueError where int32 cannot number the rows.
    """
    return _lookup_forward(tables, ids, dtype)[0]


def _lookup_forward(tables, ids, dtype):
    places = number_rows(ids, tables.shape[1])
    total = _add_rows(_no_sum(tables, ids), _flat(tables), places, dtype)
    return total.astype(dtype), (tables, ids)


def _lookup_backward(_, saved, gradient):
    tables, ids = saved
    places, gradient = number_rows(ids, tables.shape[1]), gradient.astype(jnp.float32)
    total = jnp.zeros_like(_flat(tables))
    for t in range(ids.shape[-1]):
        total = total.at[places[..., t]].add(gradient)
    return total.reshape(tables.shape), None


lookup_sum.defvjp(_lookup_forward, _lookup_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange_lookup_sum(tables, ids, dtype, axes):
    """Sums over T tables their rows `ids`, of which each of S chips of the mesh axes owns R.

    tables float32 [T, R, E]: rows of every table from R times the chip's index along `axes`.
    ids int32 [b, L, T] in 0..S*R-1 -> [b, L, E] in `dtype`. A chip asks once for each row that it
    needs. Messages have room for an ordinary text's rows in two or three rounds; the fullest chip
    decides the number of rounds, so the result is exact for any ids. Raises ValueError where int32
    cannot number the rows.
    """
    return _exchange_forward(tables, ids, dtype, axes)[0]


def _exchange_forward(tables, ids, dtype, axes):
    route = _find_route(ids, tables.shape[1], axes)
    rows = _flat(tables)

    def one_round(i, total):
        asked = _swap(_requests(route, i), axes)
        answers = _swap(rows.at[asked].get(mode="clip").astype(dtype), axes)
        slots = route.ranks - i * route.room
        places = jnp.where(_is_in(slots, route), route.owners * route.room + slots, NOWHERE)
        return _add_rows(total, _flat(answers), places, dtype)

    total = jax.lax.fori_loop(0, route.rounds, one_round, _no_sum(tables, ids))
    return total.astype(dtype), (tables, route)


def _exchange_backward(dtype, axes, saved, gradient):
    tables, route = saved
    dim, num_tables = tables.shape[-1], tables.shape[0]
    gradient = gradient.reshape(-1, dim)
    # Sorted here once: a TPU would sort before each scatter, for each table in each round.
    owners, ranks = route.owners.reshape(-1)[route.order], route.ranks.reshape(-1)[route.order]
    positions = jax.lax.div(route.order, num_tables)

    def one_round(i, total):
        asked = _swap(_requests(route, i), axes)
        slots = ranks - i * route.room
        places = owners * route.room + jnp.clip(slots, 0, route.room - 1)
        sources = jnp.where(_is_in(slots, route), positions, NOWHERE)
        sums = jnp.zeros_like(gradient, dtype=jnp.float32, shape=(asked.size, dim))
        # In T parts: all tables at once would take T times the memory.
        parts = zip(jnp.split(places, num_tables), jnp.split(sources, num_tables), strict=True)
        for here, source in parts:
            found = gradient.at[source].get(mode="fill", fill_value=0).astype(jnp.float32)
            sums = sums.at[here].add(found, indices_are_sorted=True)
        return total.at[asked].add(_swap(sums.reshape(*asked.shape, dim), axes), mode="drop")

    total = jax.lax.fori_loop(0, route.rounds, one_round, jnp.zeros_like(_flat(tables)))
    return total.reshape(tables.shape), None


exchange_lookup_sum.defvjp(_exchange_forward, _exchange_backward)


class _Route(NamedTuple):
    """Rows that a chip asks of each owner, in order.

    rows int32 [n]: the distinct rows by owner, as the owner numbers them. starts int32 [S + 1]:
    where each owner's begin in `rows`. owners, ranks int32 [b, L, T]: the owner of an id's row, and
    the row's place among those asked of this owner. order int32 [n]: ids by owner and rank. rounds:
    int32, the same on all chips.
    """

    rows: jax.Array
    starts: jax.Array
    owners: jax.Array
    ranks: jax.Array
    order: jax.Array
    rounds: jax.Array

    @property
    def room(self) -> int:
        """Number of rows in a message: a quarter of the ids, divided evenly by the owners.

        About half of an ordinary text's ids name distinct rows, more of one owner than of another;
        several rounds of small messages fit that closely, and use the same memory.
        """
        evenly = self.order.size / (self.starts.size - 1)
        return max(8, 8 * round(evenly / 32))


def _find_route(ids, num_rows, axes) -> _Route:
    num_owners, num_tables = jax.lax.axis_size(axes), ids.shape[-1]
    owned = num_tables * num_rows
    _check_rows(num_owners * owned)
    owners, rows = jax.lax.div(ids, num_rows), jax.lax.rem(ids, num_rows)
    keys = (owners * owned + number_rows(rows, num_rows)).reshape(-1)
    # Equal keys are one row, so sorts need not be stable, which doubles a TPU's compile time.
    order = jax.lax.broadcasted_iota(jnp.int32, keys.shape, 0)
    keys, order = jax.lax.sort((keys, order), num_keys=1, is_stable=False)
    first = jnp.concatenate([jnp.ones_like(keys[:1], bool), keys[1:] != keys[:-1]])
    distinct = jax.lax.sort(jnp.where(first, keys, NOWHERE), is_stable=False)
    starts = jnp.searchsorted(distinct, owned * jnp.arange(num_owners + 1, dtype=jnp.int32))
    numbers = jnp.cumsum(first, dtype=jnp.int32) - 1
    _, numbers = jax.lax.sort((order, numbers), num_keys=1, is_stable=False)  # as the ids are
    route = _Route(
        rows=jax.lax.rem(distinct, owned),
        starts=starts,
        owners=owners,
        ranks=numbers.reshape(ids.shape) - starts[owners],
        order=order,
        rounds=jnp.zeros((), jnp.int32),
    )
    rounds = jax.lax.div(jnp.max(jnp.diff(starts)) + route.room - 1, route.room)
    return route._replace(rounds=jax.lax.pmax(rounds, axes))


def _requests(route, i):
    """Returns the rows [S, room] asked of each owner in round i; NOWHERE fills up messages."""
    slots = jnp.arange(route.room, dtype=jnp.int32) + i * route.room
    slots = route.starts[:-1, None] + slots[None]
    rows = route.rows.at[slots].get(mode="clip")
    return jnp.where(slots < route.starts[1:, None], rows, NOWHERE)


def _is_in(slots, route):
    """Tells whether a place lies in the message of this round."""
    return (slots >= 0) & (slots < route.room)


def _swap(messages, axes):
    """Exchanges messages: those to each chip [S, ...] -> those from each chip [S, ...]."""
    return jax.lax.all_to_all(messages, axes, split_axis=0, concat_axis=0, tiled=True)


def _add_rows(total, rows, places, dtype):
    """Adds the rows [N, E] at `places` [b, L, T] to total float32 [b, L, E]; 0 where NOWHERE.

    Table by table: a gather of all rows would take T times the memory, and several times as long.
    """
    kind = jnp.finfo(dtype)
    for t in range(places.shape[-1]):
        row = rows.at[places[..., t]].get(mode="fill", fill_value=0)
        # XLA may leave out a cast to the dtype and back, but not this.
        total += jax.lax.reduce_precision(row, kind.nexp, kind.nmant).astype(jnp.float32)
    return total


def number_rows(ids, num_rows):
    """Numbers the rows `ids` [b, L, T] of T tables through all tables."""
    _check_rows(num_rows * ids.shape[-1])
    return ids + num_rows * jax.lax.broadcasted_iota(ids.dtype, ids.shape, ids.ndim - 1)


def _check_rows(number):
    if number > MAX_ROWS:
        raise ValueError(
            f"the tables have {number} rows together, at most {MAX_ROWS} can be told apart: "
            "lower hash.vocab, hash.sizes or hash.num_functions"
        )


def _flat(tables):
    """Reshapes [T, R, E] -> [T * R, E]."""
    return tables.reshape(-1, tables.shape[-1])


def _no_sum(tables, ids):
    """Returns zeros [b, L, E] that vary over chips as tables do, from which a loop can start."""
    return jnp.zeros_like(tables, dtype=jnp.float32, shape=(*ids.shape[:-1], tables.shape[-1]))
