"""State of the rows being generated, and the step that appends one id.

Everything here is done row by row; no row sees another.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.inference import utf8
from bltjax.inference.decoders import BLTState, Decoder, PlainState
from bltjax.inference.jobs import BlockDrafts
from bltjax.inference.sampling import SamplingArrays, distribution, draw, row_keys
from bltjax.model.cache import CacheSize
from bltjax.ops.slots import on_rows, read_positions, span, write_positions, write_slots
from bltjax.vocabulary import EOS_ID

NEVER = 2**30  # a position that no row reaches
MAX_WAIT = 8  # steps that a row waits for others, at most
DRAW, ACCEPT, REDRAW, DRAFT = range(4)  # purposes of random numbers


class ProgramShape(NamedTuple):
    """Everything static that the programs of generation are compiled for."""

    decoder: Decoder
    size: CacheSize
    max_drafts: int  # 0: no drafts
    quorum: float  # share of the rows at work that wait before the global stack runs
    blocks: BlockDrafts | None = None  # None: no blocks are filled in
    max_rows: int | None = None  # that a call of the global stack serves; None: all


class RequestArrays(NamedTuple):
    """Requests of all rows of a batch; they do not change."""

    prompt_lengths: jax.Array  # int32 [B]
    max_new_bytes: jax.Array  # int32 [B]
    seeds: jax.Array  # uint32 [B]
    stops: jax.Array  # int32 [B, S, m]  ids that end a row, -1 before shorter ones
    sampling: SamplingArrays  # [B]


class Drafting(NamedTuple):
    """State of rows that draft bytes past the end of a patch; see `self_speculation.py`."""

    anchor: jax.Array  # int32 [B]  last position before drafts; -1: none are being made
    log_p: jax.Array  # float32 [B, max_drafts, V]  distributions that drafts were drawn from
    limit: jax.Array  # int32 [B]  drafts that a row may make before they are verified
    rounds: jax.Array  # int32 [B]  times that drafts were verified
    redraw: jax.Array  # bool [B]  the next id takes the place of a refused draft
    num_drafted: jax.Array  # int32 [B]
    num_accepted: jax.Array  # int32 [B]


class BlockDrafting(NamedTuple):
    """State of rows that fill in blocks; see `block_drafts.py`."""

    rounds: jax.Array  # int32 [B]  times that drafts were verified
    redraw: jax.Array  # bool [B]  the next id takes the place of a refused draft
    num_drafted: jax.Array  # int32 [B]
    num_accepted: jax.Array  # int32 [B]
    num_in_patch: jax.Array  # int32 [B]  drafts that the patch had room for


class LogProbs(NamedTuple):
    """Predictions of the model itself, before sampling changes them, for callers who ask."""

    next: jax.Array  # float32 [B, V]  of the id at position `length`
    written: jax.Array  # float32 [B, K, V]  of the ids that the newest round of steps wrote
    first: jax.Array  # int32 [B]  position of the first of them


class Progress(NamedTuple):
    """State of the rows of a batch."""

    state: PlainState | BLTState
    length: jax.Array  # int32 [B]  ids so far, prompt and drafts included
    next_log_p: jax.Array  # float32 [B, V]  of the id at position `length`
    done: jax.Array  # bool [B]
    first_seen: jax.Array  # int32 [B, V]  where an id occurred first; with a penalty on it only
    waited: jax.Array  # int32 [B]  steps that a row has waited for the global stack
    num_steps: jax.Array  # int32  of everything but the global stack, all rows together
    num_global_calls: jax.Array  # int32  all rows together
    num_fills: jax.Array  # int32  passes that filled in blocks, all rows together
    prompt_patches: jax.Array  # int32 [B]
    drafting: Drafting | BlockDrafting | None  # None: rows do not draft
    log_probs: LogProbs | None  # None: nobody asks; not beside drafts


def draw_next(request, progress: Progress):
    """Draws the next id int32 [B] of each row."""
    drafting, length = progress.drafting, progress.length
    rounds, purpose = jnp.zeros_like(length), jnp.full_like(length, DRAW)
    if drafting is not None:
        rounds, purpose = drafting.rounds, jnp.where(drafting.redraw, REDRAW, DRAW)

    def draw_ids(log_p, *numbers):
        return draw(log_p, row_keys(*numbers))

    if request.sampling.temperature is None:  # all mass is on one id
        return jnp.argmax(progress.next_log_p, axis=-1).astype(jnp.int32)
    return on_rows(draw_ids, progress.next_log_p, request.seeds, length, rounds, purpose)


def append(shape: ProgramShape, params, request, progress: Progress, rows) -> Progress:
    """Draws the next id of some rows bool [B], and reads it."""
    length, ids = progress.length, draw_next(request, progress)
    tokens = progress.state.tokens
    positions = jnp.where(rows, length, tokens.shape[1])
    tokens = write_positions(tokens, ids[:, None], positions[:, None])
    first_seen = progress.first_seen
    if request.sampling.repetition_penalty is not None:
        all_ids = jnp.arange(shape.decoder.num_ids, dtype=jnp.int32)[None]
        occurs = rows[:, None] & (all_ids == ids[:, None])
        first_seen = jnp.minimum(first_seen, jnp.where(occurs, length[:, None], NEVER))
    log_probs = _note(progress.log_probs, length, rows)
    state, length = progress.state.with_tokens(tokens), length + rows.astype(length.dtype)
    return progress._replace(
        state=shape.decoder.read(params, state, length - 1, jnp.ones_like(length), 1),
        length=length,
        first_seen=first_seen,
        num_steps=progress.num_steps + 1,
        log_probs=log_probs,
    )


def _note(log_probs: LogProbs | None, length, rows) -> LogProbs | None:
    """Keeps the predictions that some rows just drew from."""
    if log_probs is None:
        return None
    index = jnp.where(rows, length - log_probs.first, log_probs.written.shape[1])
    written = write_slots(log_probs.written, log_probs.next[:, None], index[:, None])
    return log_probs._replace(written=written)


def next_distributions(shape: ProgramShape, request, state, first, logits, first_seen):
    """Returns distributions [B, T, V] of the ids at positions first .. first + T - 1."""
    decoder, positions = shape.decoder, span(first, 0, logits.shape[1])
    free = request.max_new_bytes[:, None]
    free -= decoder.num_written(state, request.prompt_lengths, positions)
    before = span(positions, -utf8.LONGEST, 0)
    tokens = read_positions(state.tokens, before.reshape(len(before), -1)).reshape(before.shape)

    def distributions(logits, tokens, positions, first_seen, free, sampling):
        seen = first_seen[:, None] < positions[..., None]
        allowed = jnp.ones_like(seen)
        if decoder.ids_are_bytes and sampling.valid_utf8 is not None:
            valid = utf8.may_follow(utf8.state_after(tokens), free)
            allowed = valid | ~sampling.valid_utf8[:, None, None]
        return distribution(logits, sampling, seen, allowed)

    return on_rows(distributions, logits, tokens, positions, first_seen, free, request.sampling)


def finishes(shape: ProgramShape, request, state, lengths):
    """Returns bool [B, T]: rows of lengths int32 [B, T] that end in EOS, a stop, or at a limit."""
    decoder = shape.decoder
    longest = request.stops.shape[-1]
    last = read_positions(state.tokens, lengths - 1)
    written = decoder.num_written(state, request.prompt_lengths, lengths)
    ends = (last == EOS_ID) | (written >= request.max_new_bytes[:, None])
    ends |= decoder.out_of_patches(state, lengths[:, 0])[:, None]
    positions = span(lengths, -longest, 0)
    tokens = read_positions(state.tokens, positions.reshape(len(positions), -1))
    stops = request.stops[:, None]
    is_new = positions >= request.prompt_lengths[:, None, None]
    tokens = jnp.where(is_new, tokens.reshape(positions.shape), -2)[:, :, None]
    return ends | ((tokens == stops) | (stops == -1)).all(axis=-1).any(axis=-1)


def close_all(shape: ProgramShape, params, state, last, max_patches, rows=None):
    """Closes all patches that wait; returns the state and the number of calls that it took."""
    rows = jnp.ones_like(last, bool) if rows is None else rows

    def waits(carry):
        return ((shape.decoder.num_waiting(carry[0], last) > 0) & rows).any()

    def close(carry):
        state, calls = carry
        return shape.decoder.close(params, state, last, max_patches, rows), calls + 1

    return jax.lax.while_loop(waits, close, (state, jnp.int32(0)))


def enough_wait(shape: ProgramShape, waits, done, waited):
    """Returns whether so many rows wait, or one for so long, that the global stack should run.

    Also the steps int32 [B] that each has waited then, from those before.
    """
    num_at_work = (~done).sum().astype(jnp.float32)
    wanted = shape.quorum * num_at_work
    if shape.max_rows is not None:
        wanted = jnp.minimum(wanted, shape.max_rows)
    are_many = waits.sum().astype(jnp.float32) >= wanted
    calls = waits.any() & (are_many | (waited >= MAX_WAIT).any())
    return calls, jnp.where(waits & ~calls, waited + 1, 0)


def find_first_seen(tokens, lengths, num_ids: int):
    """Returns int32 [B, num_ids]: first positions of ids in tokens [B, C] of lengths int32 [B]."""

    def of_row(tokens, length):
        positions = jnp.arange(len(tokens), dtype=jnp.int32)
        positions = jnp.where(positions < length, positions, NEVER)
        return jnp.full(num_ids, NEVER, jnp.int32).at[tokens].min(positions)

    return jax.vmap(of_row)(tokens, lengths)
