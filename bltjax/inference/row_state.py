"""Rows that are being generated: what is asked of them, where they are, one byte more.

What is here is done row by row; no row sees another.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.inference import model_steps, utf8
from bltjax.inference.model_steps import Configs, State
from bltjax.inference.sampling import Knobs, distribution, draw, row_keys
from bltjax.model.cache import Room
from bltjax.ops.slots import on_rows, read_positions, span, write_positions
from bltjax.vocabulary import EOS_ID, VOCAB_SIZE

NEVER = 2**30  # a position that no row reaches
DRAW, ACCEPT, REDRAW = range(3)  # what random numbers are for


class Plan(NamedTuple):
    """What programs are compiled for: all static."""

    configs: Configs
    room: Room
    max_drafts: int  # 0: no drafts
    quorum: float  # share of the rows at work that wait before the global stack runs


class Request(NamedTuple):
    """What is asked of each row; does not change."""

    prompt_lengths: jax.Array  # int32 [B]
    stop_at: jax.Array  # int32 [B]  length at which a row ends
    seeds: jax.Array  # uint32 [B]
    stops: jax.Array  # int32 [S, m]  ids that end a row, -1 before shorter ones
    knobs: Knobs


class Progress(NamedTuple):
    """Where the rows are."""

    state: State
    length: jax.Array  # int32 [B]  ids so far, prompt and drafts included
    next_log_p: jax.Array  # float32 [B, V]  of the id at position `length`
    drawable: jax.Array  # bool [B]  next_log_p is known
    redraw: jax.Array  # bool [B]  it is what a refused draft leaves over
    done: jax.Array  # bool [B]
    first_seen: jax.Array  # int32 [B, V]  position where an id occurred first
    anchor: jax.Array  # int32 [B]  last position before drafts; -1: none are being made
    draft_log_p: jax.Array  # float32 [B, max_drafts, V]  what drafts were drawn from
    draft_limit: jax.Array  # int32 [B]
    rounds: jax.Array  # int32 [B]  of drafts that were verified
    counts: dict[str, jax.Array]


def append(plan, params, request, progress, rows) -> Progress:
    """Draws the next id of some rows, and reads it."""

    def draw_ids(log_p, seeds, length, rounds, redraw):
        keys = row_keys(seeds, length, rounds, jnp.where(redraw, REDRAW, DRAW))
        return draw(log_p, keys)

    ids = on_rows(
        draw_ids,
        progress.next_log_p,
        request.seeds,
        progress.length,
        progress.rounds,
        progress.redraw,
    )
    record = progress.state.record
    slots = jnp.where(rows, progress.length, record.tokens.shape[1])
    record = record._replace(tokens=write_positions(record.tokens, ids[:, None], slots[:, None]))
    occurs = rows[:, None] & (jnp.arange(VOCAB_SIZE)[None] == ids[:, None])
    first_seen = jnp.minimum(
        progress.first_seen, jnp.where(occurs, progress.length[:, None], NEVER)
    )
    length = progress.length + rows
    last, one = length - 1, jnp.ones_like(length)
    state = progress.state._replace(record=record)
    return progress._replace(
        state=model_steps.read(plan.configs, params, state, last, one, 1),
        length=length,
        first_seen=first_seen,
        counts=counted(progress.counts, steps=1),
    )


def next_distributions(request, state: State, first, logits, first_seen):
    """Distributions [B, T, V] of the ids at positions first .. first + T - 1, from logits."""

    def distributions(logits, tokens, positions, first_seen, stop_at, knobs):
        def valid(_):
            return utf8.may_follow(utf8.state_after(tokens), stop_at[:, None] - positions)

        seen = first_seen[:, None] < positions[..., None]
        allowed = jax.lax.cond(knobs.valid_utf8, valid, lambda _: jnp.ones_like(seen), None)
        return distribution(logits, knobs, seen, allowed)

    positions = span(first, 0, logits.shape[1])
    before = span(positions, -utf8.LONGEST, 0)
    tokens = read_positions(state.record.tokens, before.reshape(len(before), -1))
    return on_rows(
        distributions,
        logits[..., :VOCAB_SIZE],
        tokens.reshape(before.shape),
        positions,
        first_seen,
        request.stop_at,
        request.knobs,
    )


def finishes(request, state: State, lengths):
    """Whether a row ends with lengths [B, T]: in EOS, in a stop string, or out of room."""
    num_stops, longest = request.stops.shape
    last = read_positions(state.record.tokens, lengths - 1)
    ends = (last == EOS_ID) | (lengths >= request.stop_at[:, None])
    ends |= out_of_patches(state, lengths[:, 0])[:, None]
    if num_stops == 0:
        return ends
    positions = span(lengths, -longest, 0)
    tokens = read_positions(state.record.tokens, positions.reshape(len(positions), -1))
    stops = request.stops[None, None]
    written = positions >= request.prompt_lengths[:, None, None]
    tokens = jnp.where(written, tokens.reshape(positions.shape), -2)[:, :, None]
    return ends | ((tokens == stops) | (stops == -1)).all(axis=-1).any(axis=-1)


def out_of_patches(state: State, lengths):
    """bool [B]: rows of lengths int32 [B] that were read and complete more patches than fit."""
    room = state.blt.patch[0].keys.shape[2]
    return model_steps.num_complete(state, lengths - 1) > room


def close_all(plan, params, state: State, last, at_once, rows=None):
    """The state when no patch of the rows waits, and the calls of the global stack that it took."""
    rows = jnp.ones_like(last, bool) if rows is None else rows

    def waits(carry):
        return ((model_steps.num_waiting(carry[0], last) > 0) & rows).any()

    def close(carry):
        state, calls = carry
        return model_steps.close(plan.configs, params, state, last, at_once, rows), calls + 1

    return jax.lax.while_loop(waits, close, (state, jnp.int32(0)))


def quorum(plan, waits, done):
    """Whether the global stack should run."""
    return waits.any() & (waits.sum() >= plan.quorum * (~done).sum())


def first_seen(tokens, lengths):
    """int32 [B, V]: the first position of each id in tokens [B, C] of so many."""

    def of_row(tokens, length):
        positions = jnp.arange(len(tokens))
        positions = jnp.where(positions < length, positions, NEVER)
        return jnp.full(VOCAB_SIZE, NEVER, jnp.int32).at[tokens].min(positions)

    return jax.vmap(of_row)(tokens, lengths)


def take_each(x, index):
    """x[b, index[b]] for each row."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def counted(counts, **more):
    return counts | {name: counts[name] + number for name, number in more.items()}
