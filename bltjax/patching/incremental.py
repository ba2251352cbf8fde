"""Patch starts of texts that grow byte by byte, equal to those of the whole texts.

A `Record` holds what is known of every position of a row, so that a row can step back: positions
from some point on are then read again, and their entries are written over.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.ops.slots import read_positions, span, write_positions
from bltjax.patching.boundaries import NEWLINE_ID, rule_of, starts_after


class Record(NamedTuple):
    """Facts about each position of B rows, with room for C positions."""

    tokens: jax.Array  # int32 [B, C]
    entropies: jax.Array  # float32 [B, C], nats: of the byte that follows
    line_starts: jax.Array  # int32 [B, C]  where the context of the entropy model starts
    num_starts: jax.Array  # int32 [B, C]  patches that start up to the byte that follows
    rule_starts: jax.Array  # int32 [B, C]  the last of them, without `max_patch_length`
    start_positions: jax.Array  # int32 [B, C + 1]  where each patch starts


def new_record(tokens: jax.Array) -> Record:
    """Returns the record of tokens int32 [B, C] of which nothing else is known yet."""
    zeros = jnp.zeros_like(tokens)
    more = jnp.concatenate([zeros, zeros[:, :1]], axis=1)
    return Record(tokens, jnp.zeros_like(tokens, jnp.float32), zeros, zeros, zeros, more)


def note_lines(record: Record, first: jax.Array, count: jax.Array, num_new: int) -> Record:
    """Returns the record with `line_starts` of positions first .. first + count - 1 of each row.

    first, count int32 [B], count at most num_new. A newline belongs to the line that it ends.
    """
    positions = span(first, 0, num_new)
    before = read_positions(record.tokens, positions - 1)
    opens = before == NEWLINE_ID
    last = read_positions(record.line_starts, first[:, None] - 1)  # 0 before the first
    starts = jax.lax.cummax(jnp.where(opens, positions, last), axis=1)
    return record._replace(line_starts=_write(record.line_starts, starts, positions, count))


def note_starts(config, record: Record, first, count, entropies: jax.Array) -> Record:
    """Returns the record with patch starts after positions first .. first + count - 1 of each row.

    config: a PatchingConfig. entropies: float32 [B, T], of T positions from `first` on; anything
    for rules that need none. first, count: int32 [B], count at most T.
    """
    positions = span(first, 0, entropies.shape[1])
    back = rule_of(config).looks_back
    shown = span(first, -back, entropies.shape[1])
    earlier = read_positions(record.entropies, shown[:, :back])
    last = jnp.where(first > 0, read_positions(record.rule_starts, first[:, None] - 1)[:, 0], 0)
    starts = starts_after(
        config,
        read_positions(record.tokens, shown),
        jnp.concatenate([earlier, entropies], axis=1),
        shown,
        open_bytes=first - last,  # rules that look at it do not look back
    )[:, back:]
    following = positions + 1
    last_start = jax.lax.cummax(jnp.where(starts, following, last[:, None]), axis=1)
    if config.max_patch_length is not None:
        starts = (following - last_start) % config.max_patch_length == 0
    known = jnp.where(first > 0, read_positions(record.num_starts, first[:, None] - 1)[:, 0], 1)
    num_starts = known[:, None] + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    room = record.start_positions.shape[1]
    noted = starts & (positions < (first + count)[:, None])
    return record._replace(
        entropies=_write(record.entropies, entropies, positions, count),
        num_starts=_write(record.num_starts, num_starts, positions, count),
        rule_starts=_write(record.rule_starts, last_start, positions, count),
        start_positions=write_positions(
            record.start_positions, following, jnp.where(noted, num_starts - 1, room)
        ),
    )


def _write(values, new, positions, count):
    known = positions < (positions[:, :1] + count[:, None])
    return write_positions(values, new, jnp.where(known, positions, values.shape[1]))
