"""Generation on the device: programs that read prompts and write ids (model.md#generation).

A prompt is read in chunks (`new_reading`, `read`), and `start` makes rows of it that write on; with
`enter` one goes into a free slot of a batch at work. `decode` writes.

The global stack runs once per patch. Rows of a batch close patches at different times, so a row
whose patch is complete waits while the others go on, until a quorum of rows waits; one call of the
global stack then serves them all. What a row yields depends on no other row. With drafts a row does
not wait, see `self_speculation.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.inference.block_drafts import block_step
from bltjax.inference.decoders import BLTState, PlainState
from bltjax.inference.row_state import (
    BlockDrafting,
    Drafting,
    LogProbs,
    ProgramShape,
    Progress,
    RequestArrays,
    append,
    close_all,
    enough_wait,
    find_first_seen,
    finishes,
    next_distributions,
)
from bltjax.inference.self_speculation import drafting_step
from bltjax.ops.slots import on_rows, put_row

PATCH_BYTES = 4  # of prompts, as a guess: patches that a call of the global stack reads at most


class Reading(NamedTuple):
    """State of rows whose prompts are being read."""

    state: PlainState | BLTState
    first: jax.Array  # int32 [B]  positions that have been read
    logits: jax.Array  # float32 [B, V]  after the last of them


class View(NamedTuple):
    """Facts that the host wants of rows; fields as of `Progress`."""

    tokens: jax.Array
    length: jax.Array
    done: jax.Array
    is_full: jax.Array  # bool [B]  more patches than there is room for
    num_patches: jax.Array
    prompt_patches: jax.Array
    num_steps: jax.Array
    num_global_calls: jax.Array
    num_fills: jax.Array
    drafts: tuple[jax.Array, ...] | None  # num_drafted, num_accepted, num_in_patch, anchor
    log_probs: tuple[jax.Array, ...] | None  # written, first


@functools.partial(jax.jit, static_argnums=0)
def new_reading(shape: ProgramShape, tokens, thresholds) -> Reading:
    """Returns rows with the prompts in tokens int32 [B, C], of which nothing is read.

    thresholds: float32 [B], nats, of the patching rule.
    """
    state = shape.decoder.new_state(shape.size, tokens, thresholds)
    return _reading(shape, state, jnp.zeros_like(tokens[:, 0]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def reopen(shape: ProgramShape, progress: Progress, tokens, kept) -> Reading:
    """Returns rows whose prompts in tokens int32 [B, C] begin with what `progress` has read.

    kept: int32 [B], the ids that they share, from 1 on. The last one is read again, since it may
    have been predicted while its patch waited; with it rows step back by `max_rewind` at most.
    """
    state = progress.state.with_tokens(tokens)
    return _reading(shape, shape.decoder.rewind(state, kept - 1), kept - 1)


@jax.jit
def copy(reading: Reading) -> Reading:
    """Returns a copy, for `read` takes its argument's memory."""
    return jax.tree.map(jnp.copy, reading)


def with_tokens(reading: Reading, tokens) -> Reading:
    """Returns the rows with tokens int32 [B, C] that agree with theirs as far as they are read."""
    return reading._replace(state=reading.state.with_tokens(tokens))


def _reading(shape: ProgramShape, state, first) -> Reading:
    logits = jnp.zeros_like(state.tokens[:, :1], jnp.float32)
    return Reading(state, first, logits.repeat(shape.decoder.num_ids, axis=1))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(shape: ProgramShape, params, reading: Reading, lengths, max_chunks) -> Reading:
    """Reads prompts up to lengths int32 [B], in so many chunks at most."""
    decoder, num_new = shape.decoder, shape.size.chunk
    max_patches = -(-num_new // PATCH_BYTES)

    def read_chunk(carry):
        (state, first, logits), chunks = carry
        count = jnp.minimum(lengths - first, num_new)
        state = decoder.read(params, state, first, count, num_new)
        state = close_all(shape, params, state, first + count - 1, max_patches)[0]
        last, state = decoder.predict_last(params, state, first, count, num_new)
        logits = jnp.where((count > 0)[:, None], last, logits)
        return Reading(state, first + count, logits), chunks + 1

    def goes_on(carry):
        return (carry[0].first < lengths).any() & (carry[1] < max_chunks)

    return jax.lax.while_loop(goes_on, read_chunk, (reading, jnp.int32(0)))[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def start(shape: ProgramShape, num_log_probs: int, reading: Reading, request: RequestArrays):
    """Returns the Progress of rows whose prompts have been read, up to the next distribution.

    num_log_probs: steps of a round whose log-probabilities are kept; 0: none are.
    """
    decoder, lengths, (state, _, logits) = shape.decoder, request.prompt_lengths, reading
    zeros = jnp.zeros_like(lengths)
    seen = on_rows(lambda *rows: find_first_seen(*rows, decoder.num_ids), state.tokens, lengths)
    drafting = log_probs = None
    if shape.max_drafts:
        drafting = Drafting(
            anchor=zeros - 1,
            log_p=jnp.zeros_like(logits[:, None].repeat(shape.max_drafts, axis=1)),
            limit=zeros + shape.max_drafts,
            rounds=zeros,
            redraw=zeros < 0,
            num_drafted=zeros,
            num_accepted=zeros,
        )
    if shape.blocks:
        drafting = BlockDrafting(zeros, zeros < 0, zeros, zeros, zeros)
    if num_log_probs:
        log_probs = LogProbs(
            next=jax.nn.log_softmax(logits),
            written=jnp.zeros_like(logits[:, None].repeat(num_log_probs, axis=1)),
            first=lengths,
        )
    return Progress(
        state=state,
        length=lengths,
        next_log_p=next_distributions(shape, request, state, lengths, logits[:, None], seen)[:, 0],
        done=request.max_new_bytes <= 0,
        first_seen=seen,
        waited=zeros,
        num_steps=jnp.int32(0),
        num_global_calls=jnp.int32(0),
        num_fills=jnp.int32(0),
        prompt_patches=decoder.num_patches(state),
        drafting=drafting,
        log_probs=log_probs,
    )


@functools.partial(jax.jit, donate_argnums=0)
def enter(progress: Progress, row: Progress, slot) -> Progress:
    """Puts the first row of `row`, which `start` has made, into a slot."""
    names = ("num_steps", "num_global_calls", "num_fills")
    counts = {name: getattr(progress, name) for name in names}
    none = dict.fromkeys(names)  # they have no rows
    rows = jax.tree.map(
        lambda x, new: put_row(x, new, slot), progress._replace(**none), row._replace(**none)
    )
    return rows._replace(**counts)


@functools.partial(jax.jit, static_argnums=0)
def look(shape: ProgramShape, progress: Progress) -> View:
    """Returns what the host wants to know of the rows."""
    drafting, log_probs = progress.drafting, progress.log_probs
    return View(
        tokens=progress.state.tokens,
        length=progress.length,
        done=progress.done,
        is_full=shape.decoder.out_of_patches(progress.state, progress.length),
        num_patches=shape.decoder.num_patches(progress.state),
        prompt_patches=progress.prompt_patches,
        num_steps=progress.num_steps,
        num_global_calls=progress.num_global_calls,
        num_fills=progress.num_fills,
        drafts=drafting and _drafts(drafting),
        log_probs=log_probs and (log_probs.written, log_probs.first),
    )


def _drafts(drafting: Drafting | BlockDrafting) -> tuple[jax.Array, ...]:
    """Returns counts of drafts, and the last positions before those that nothing verified yet.

    All int32 [B]; -1: all are verified.
    """
    counts, none = (drafting.num_drafted, drafting.num_accepted), jnp.zeros_like(drafting.rounds)
    if isinstance(drafting, Drafting):
        return *counts, none, drafting.anchor
    return *counts, drafting.num_in_patch, none - 1


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    shape: ProgramShape, params, progress: Progress, request: RequestArrays, max_steps, max_done
) -> Progress:
    """Writes ids, one per row and step, until `max_done` rows are done or for `max_steps`."""
    last_step = progress.num_steps + max_steps
    if progress.log_probs is not None:
        log_probs = progress.log_probs._replace(first=progress.length)
        progress = progress._replace(log_probs=log_probs)

    def at_work(progress):
        few_done = progress.done.sum() < max_done
        return ~progress.done.all() & few_done & (progress.num_steps < last_step)

    step = drafting_step if shape.max_drafts else block_step if shape.blocks else _plain_step
    return jax.lax.while_loop(at_work, functools.partial(step, shape, params, request), progress)


def _plain_step(shape: ProgramShape, params, request, progress: Progress) -> Progress:
    """Appends an id to each row that does not wait; runs the global stack if enough rows wait."""
    decoder = shape.decoder
    waits = decoder.num_waiting(progress.state, progress.length - 1) > 0
    progress = append(shape, params, request, progress, ~waits & ~progress.done)
    finished = finishes(shape, request, progress.state, progress.length[:, None])[:, 0]
    done, last = progress.done | finished, progress.length - 1
    waits = (decoder.num_waiting(progress.state, last) > 0) & ~done
    calls, waited = enough_wait(shape, waits, done, progress.waited)
    state = jax.lax.cond(
        calls,
        lambda state: decoder.close(params, state, last, 1, waits, shape.max_rows),
        lambda state: state,
        progress.state,
    )
    logits, state = decoder.predict(params, state, last, jnp.ones_like(last), 1)
    seen, log_probs = progress.first_seen, progress.log_probs
    if log_probs is not None:
        log_probs = log_probs._replace(next=jax.nn.log_softmax(logits[:, 0]))
    return progress._replace(
        state=state,
        next_log_p=next_distributions(shape, request, state, progress.length, logits, seen)[:, 0],
        done=done,
        waited=waited,
        num_global_calls=progress.num_global_calls + calls.astype(jnp.int32),
        log_probs=log_probs,
    )
