"""Blocks: the decoder drafts the rest of a patch in one pass, and one causal pass verifies it.

BLT-DV (Kallini et al., 2026, algorithm 2) for a decoder that was trained to fill in blocks, or
without the verification BLT-D. A block starts where a patch does, as in training, and holds the
bytes of it that are written. The next byte is drawn from its own distribution; the rest of the
block is filled in, in one pass or a few, each after the encoder has read the bytes that are known;
then everything is read at once. Drafts stand as far as the model itself would have drawn them and
as the patch goes: beyond, the decoder waits for the patch as it does in plain decoding. So no call
of the global stack is made for text that may not stand, and no block is filled in with a patch that
training never saw there.

Greedy text is that of plain decoding; drawn text has the same distribution (`sampling.leftover`).
"""

import functools

import jax
import jax.numpy as jnp

from bltjax.inference.row_state import (
    DRAFT,
    NEVER,
    ProgramShape,
    Progress,
    draw_next,
    enough_wait,
    finishes,
    next_distributions,
)
from bltjax.inference.sampling import draw, row_keys
from bltjax.inference.self_speculation import accept
from bltjax.model.block_rows import num_known
from bltjax.ops.slots import below, on_rows, read_positions, span, write_positions
from bltjax.vocabulary import MASK_ID


def block_step(shape: ProgramShape, params, request, progress: Progress) -> Progress:
    """Writes a byte and the drafts after it that stand in each row that waits for no patch."""
    decoder, size, length = shape.decoder, shape.blocks.size, progress.length
    at_work = ~progress.done & (decoder.num_waiting(progress.state, length - 1) == 0)
    starts = decoder.open_patch(progress.state, length - 1)
    known = jnp.minimum(length + 1 - starts, size)  # bytes of the block, with the next one
    next_ids = draw_next(request, progress)[:, None]
    tokens = _write(progress.state.tokens, next_ids, length, at_work[:, None])
    state = progress.state.with_tokens(tokens)
    ids, log_q, fills = _fill_in(
        shape, params, request, progress._replace(state=state), starts, known
    )
    filled = below(num_known(ids) - known, size - 1)
    drafted = filled & at_work[:, None]  # after the next byte
    progress = progress._replace(num_fills=progress.num_fills + fills)
    drafts, log_q = _shift(ids, known, size - 1), _shift(log_q, known, size - 1)
    tokens = _write(tokens, drafts, length + 1, drafted)
    num_drafts = drafted.sum(axis=1, dtype=jnp.int32)
    count = jnp.where(at_work, 1 + num_drafts, 0)
    state = decoder.read(params, state.with_tokens(tokens), length, count, size)
    logits, state = decoder.predict(params, state, length, count, size)
    new = jnp.concatenate([next_ids, drafts], axis=1)
    seen = _seen_with(shape, request, progress, new, below(count, size))
    target = next_distributions(shape, request, state, length + 1, logits, seen)
    there = drafted & decoder.in_patch(state, length, size - 1)
    keys = request.seeds, length, progress.drafting.rounds
    decide = functools.partial(accept, verified=shape.blocks.verified)
    accepted, next_log_p = on_rows(decide, drafts, target, log_q, there, *keys)
    drafting = progress.drafting
    drafting = drafting._replace(
        num_drafted=drafting.num_drafted + num_drafts,
        num_in_patch=drafting.num_in_patch + there.sum(axis=1, dtype=jnp.int32),
    )
    progress = progress._replace(state=state, first_seen=seen, drafting=drafting)
    return _settle(shape, params, request, progress, at_work, num_drafts, accepted, next_log_p)


def _settle(
    shape: ProgramShape, params, request, progress: Progress, at_work, num_drafts, accepted, log_p
) -> Progress:
    """Keeps what stands of the drafts of rows at work, and closes the patches that are complete."""
    decoder, size, drafting = shape.decoder, shape.blocks.size, progress.drafting
    state, seen = progress.state, progress.first_seen
    lengths = span(progress.length + 1, 0, size)
    ends = finishes(shape, request, state, lengths) & below(accepted + 1, size)
    finished = ends.any(axis=1) & at_work
    kept = jnp.where(finished, jax.lax.argmax(ends, 1, jnp.int32), accepted)
    length = jnp.where(at_work, progress.length + 1 + kept, progress.length)
    done, last = progress.done | finished, length - 1
    state = decoder.rewind(state, last)
    waits = (decoder.num_waiting(state, last) > 0) & ~done
    refused = at_work & (accepted < num_drafts) & ~waits
    calls, waited = enough_wait(shape, waits, done, progress.waited)
    progress = progress._replace(
        state=state,
        length=length,
        next_log_p=jnp.where(at_work[:, None], log_p, progress.next_log_p),
        done=done,
        first_seen=jnp.where(seen >= length[:, None], NEVER, seen),
        waited=waited,
        num_steps=progress.num_steps + 1,
        num_global_calls=progress.num_global_calls + calls.astype(jnp.int32),
        drafting=drafting._replace(
            rounds=drafting.rounds + at_work.astype(jnp.int32),
            redraw=jnp.where(at_work, refused, drafting.redraw),
            num_accepted=drafting.num_accepted + jnp.where(at_work, kept, 0),
        ),
    )
    return jax.lax.cond(
        calls,
        lambda progress: _close(shape, params, request, progress, waits),
        lambda progress: progress,
        progress,
    )


def _close(shape: ProgramShape, params, request, progress: Progress, waits) -> Progress:
    """Closes the patches of rows that wait, and finds what comes after them."""
    decoder, last, seen = shape.decoder, progress.length - 1, progress.first_seen
    state = decoder.close(params, progress.state, last, 1, waits, shape.max_rows)
    logits, state = decoder.predict(params, state, last, jnp.ones_like(last), 1)
    log_p = next_distributions(shape, request, state, progress.length, logits, seen)[:, 0]
    closed = waits & (decoder.num_waiting(state, last) == 0)
    return progress._replace(
        state=state, next_log_p=jnp.where(closed[:, None], log_p, progress.next_log_p)
    )


def _fill_in(shape: ProgramShape, params, request, progress: Progress, starts, known):
    """Fills in the blocks at `starts`, of which the first `known` bytes are there.

    All but the last of these have been read. Returns the ids int32 [B, K], MASK_ID where none is
    sure enough, what they were drawn from, float32 [B, K, V], and the passes.
    """
    decoder, blocks, state = shape.decoder, shape.blocks, progress.state
    in_one_pass = blocks.keeps_all or blocks.max_passes == 1
    positions = span(starts, 0, blocks.size)
    ids = jnp.where(below(known, blocks.size), read_positions(state.tokens, positions), MASK_ID)

    def draw_ids(log_p, seeds, positions, rounds):
        return jax.vmap(
            lambda log_p, at: draw(log_p, row_keys(seeds, at, rounds, jnp.full_like(at, DRAFT))),
            in_axes=1,
            out_axes=1,
        )(log_p, positions)

    def one_pass(carry):
        ids, log_q, passes = carry
        begun = state.with_tokens(_write(state.tokens, ids, starts, ids != MASK_ID))
        begun = decoder.read_states(
            params, begun, progress.length, 1 if in_one_pass else blocks.size
        )
        logits = decoder.predict_block(params, begun, ids, starts)
        log_p = next_distributions(shape, request, begun, starts, logits, progress.first_seen)
        if request.sampling.temperature is None:
            drawn = jnp.argmax(log_p, axis=-1).astype(jnp.int32)
        else:
            drawn = on_rows(draw_ids, log_p, request.seeds, positions, progress.drafting.rounds)
        is_last = passes + 1 == (blocks.max_passes or NEVER)
        chosen = on_rows(functools.partial(_choose, blocks), logits, ids == MASK_ID, is_last)
        ids, log_q = jnp.where(chosen, drawn, ids), jnp.where(chosen[..., None], log_p, log_q)
        return ids, log_q, passes + 1

    nothing = jnp.zeros_like(progress.next_log_p)[:, None].repeat(blocks.size, axis=1)
    carry = ids, nothing, jnp.int32(0)
    if in_one_pass:
        return one_pass(carry)

    def goes_on(carry):
        ids, _, passes = carry
        return (ids == MASK_ID).any() & (passes < (blocks.max_passes or NEVER))

    return jax.lax.while_loop(goes_on, one_pass, carry)


def _choose(blocks, logits, is_masked, is_last):
    """Returns which of the bytes that are masked, bool [B, K], are kept of a pass.

    Of a block that is verified those from the left on, so that each was drawn from what is before
    it alone, as the verification takes it; else the surest ones. Unless is_last, so that no pass
    follows, one byte at least is kept.
    """
    if blocks.keeps_all:
        return is_masked
    log_p = jax.nn.log_softmax(logits)
    if by_entropy := blocks.entropy_bound is not None:
        doubt = -(jnp.exp(log_p) * log_p).sum(axis=-1)
    else:
        doubt = -log_p.max(axis=-1)
    rank = jnp.broadcast_to(jnp.arange(is_masked.shape[1]), is_masked.shape)
    key = jnp.where(is_masked, rank if blocks.verified else doubt, jnp.inf)
    order = jnp.argsort(key, axis=-1)  # those that are not masked come last
    doubt = jnp.take_along_axis(doubt, order, axis=-1)
    if by_entropy:
        is_sure = jnp.cumsum(doubt, axis=-1) <= blocks.entropy_bound
    else:
        is_sure = jnp.cumprod(jnp.exp(-doubt) > blocks.confidence, axis=-1).astype(bool)
    kept = is_sure | ((rank == 0) & jnp.logical_not(is_last))
    return is_masked & jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def _seen_with(shape: ProgramShape, request, progress: Progress, new, count):
    """Returns `first_seen` with new ids [B, K], of which those bool [B, K] are there."""
    if request.sampling.repetition_penalty is None:
        return progress.first_seen
    all_ids = jnp.arange(shape.decoder.num_ids, dtype=jnp.int32)[None, None]
    occurs = (new[..., None] == all_ids) & count[..., None]
    positions = span(progress.length, 0, new.shape[1])[..., None]
    return jnp.minimum(progress.first_seen, jnp.where(occurs, positions, NEVER).min(axis=1))


def _write(tokens, new, first, rows):
    """Writes new [B, T] into tokens [B, C] from `first` on, where rows bool [B, T]."""
    positions = jnp.where(rows, span(first, 0, new.shape[1]), tokens.shape[1])
    return write_positions(tokens, new, positions)


def _shift(values, start, number: int):
    """Returns values[b, start[b] : start[b] + number] of values [B, K, ...], clipped."""

    def of_row(row, start):
        at = jnp.minimum(start + jnp.arange(number, dtype=start.dtype), len(row) - 1)
        return row[at]

    return on_rows(jax.vmap(of_row), values, start)
