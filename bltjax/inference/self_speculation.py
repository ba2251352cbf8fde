"""Self-speculation: a row drafts bytes past the end of its patch, and one pass verifies them.

BLT-S (Kallini et al. 2026, algorithm 2), without training: a row whose patch is complete does not
wait for the global stack but goes on with the last patch that it has. After some drafts the global
stack reads all patches that they completed, in one call, and one pass of the decoder over the
drafted positions says which of them stand. Greedy text is that of plain decoding; drawn text has
the same distribution (`sampling.leftover`). How many drafts a row makes follows how many stood.
"""

import jax
import jax.numpy as jnp

from bltjax.inference.row_state import (
    ACCEPT,
    NEVER,
    Drafting,
    ProgramShape,
    Progress,
    append,
    close_all,
    enough_wait,
    finishes,
    next_distributions,
)
from bltjax.inference.sampling import leftover, row_keys
from bltjax.ops.slots import below, on_rows, read_positions, span

PATCHES_PER_CALL = 2  # that drafts completed, in a call of the global stack


def drafting_step(shape: ProgramShape, params, request, progress: Progress) -> Progress:
    """Appends a byte, or a draft of one, to each row that has no drafts to be verified."""
    is_drafting = progress.drafting.anchor >= 0
    goes_on = ~progress.done & ~_awaits_verification(shape, request, progress)
    progress = progress._replace(drafting=_note_distributions(progress, goes_on))
    progress = append(shape, params, request, progress, goes_on)
    drafting, last = progress.drafting, progress.length - 1
    finished = finishes(shape, request, progress.state, progress.length[:, None])[:, 0]
    done = progress.done | (finished & ~is_drafting)
    starts = (shape.decoder.num_waiting(progress.state, last) > 0) & ~is_drafting & ~done
    drafting = drafting._replace(anchor=jnp.where(starts, last, drafting.anchor))
    progress = progress._replace(done=done, drafting=drafting)
    waits = _awaits_verification(shape, request, progress)
    calls, waited = enough_wait(shape, waits, done, progress.waited)
    progress = progress._replace(waited=waited)
    progress = jax.lax.cond(
        calls,
        lambda progress: _verify(shape, params, request, progress, waits),
        lambda progress: progress,
        progress,
    )
    settled = waits | done  # these know the next distribution, or wait for it
    return jax.lax.cond(
        settled.all(),
        lambda progress: progress,
        lambda progress: _predict_one(shape, params, request, progress, ~settled),
        progress,
    )


def _predict_one(shape: ProgramShape, params, request, progress: Progress, rows) -> Progress:
    last, seen = progress.length - 1, progress.first_seen
    count = rows.astype(jnp.int32)
    logits, state = shape.decoder.predict(params, progress.state, last, count, 1)
    log_p = next_distributions(shape, request, state, progress.length, logits, seen)[:, 0]
    drafting = progress.drafting
    return progress._replace(
        state=state,
        next_log_p=jnp.where(rows[:, None], log_p, progress.next_log_p),
        drafting=drafting._replace(redraw=drafting.redraw & ~rows),
    )


def _verify(shape: ProgramShape, params, request, progress: Progress, rows) -> Progress:
    """Keeps the drafts of some rows as far as the full model would have drawn them."""
    decoder, drafting, max_drafts = shape.decoder, progress.drafting, shape.max_drafts
    last = progress.length - 1
    drafts = jnp.where(rows, last - drafting.anchor, 0)
    first = jnp.where(rows, drafting.anchor, last)
    state, calls = close_all(shape, params, progress.state, last, PATCHES_PER_CALL, rows)
    count = jnp.where(rows, drafts + 1, 0)
    logits, state = decoder.predict(params, state, first, count, max_drafts + 1)
    target = next_distributions(shape, request, state, first + 1, logits, progress.first_seen)
    positions = span(first + 1, 0, max_drafts)
    tokens = read_positions(state.tokens, positions)
    ends = finishes(shape, request, state, positions + 1)
    there, keys = below(drafts, max_drafts), (request.seeds, first, drafting.rounds)
    accepted, next_log_p = on_rows(accept, tokens, target, drafting.log_p, there, *keys)
    stand = below(accepted, max_drafts)
    done = (stand & ends).any(axis=1)
    kept = jnp.where(done, jax.lax.argmax(stand & ends, 1, jnp.int32) + 1, accepted)
    length = jnp.where(rows, first + 1 + kept, progress.length)
    all_stand = accepted == drafts
    limit = jnp.where(all_stand, jnp.minimum(2 * drafting.limit, max_drafts), accepted + 1)
    forgotten = progress.first_seen >= length[:, None]
    return progress._replace(
        state=decoder.rewind(state, length - 1),
        length=length,
        next_log_p=jnp.where(rows[:, None], next_log_p, progress.next_log_p),
        done=progress.done | (rows & done),
        first_seen=jnp.where(forgotten, NEVER, progress.first_seen),
        num_global_calls=progress.num_global_calls + calls,
        drafting=drafting._replace(
            anchor=jnp.where(rows, -1, drafting.anchor),
            limit=jnp.where(rows, limit, drafting.limit),
            rounds=drafting.rounds + rows.astype(jnp.int32),
            redraw=jnp.where(rows, ~all_stand, drafting.redraw),
            num_drafted=drafting.num_drafted + drafts,
            num_accepted=drafting.num_accepted + jnp.where(rows, kept, 0),
        ),
    )


def accept(drafts, target, drafted, there, seeds, first, rounds, verified: bool = True):
    """Returns int32 [B], how many drafts of each row stand, and the distribution of the next id.

    drafts int32 [B, k] were drawn from drafted [B, k, V], of which the first ones are there, bool
    [B, k]; target [B, k + 1, V]. verified: else all that are there stand.
    """
    number, fits = drafts.shape[1], there
    if verified:
        keys = row_keys(seeds, first, rounds, jnp.full_like(first, ACCEPT))
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (number,), jnp.float32))(keys)
        target_p, drafted_p = (
            jnp.exp(jnp.take_along_axis(x[:, :number], drafts[..., None], -1)[..., 0])
            for x in (target, drafted)
        )
        fits = there & (uniform * drafted_p < target_p)
    accepted = jnp.cumprod(fits, axis=1).sum(axis=1).astype(jnp.int32)
    take_each = jax.vmap(lambda row, i: row[i])
    following, index = take_each(target, accepted), jnp.minimum(accepted, number - 1)
    refused = take_each(there, index) & (accepted < number)
    left = leftover(following, take_each(drafted, index))
    return accepted, jnp.where(refused[:, None], left, following)


def _awaits_verification(shape: ProgramShape, request, progress: Progress):
    """Returns bool [B]: rows whose drafts are as many as they may be, or reach an end."""
    drafting = progress.drafting
    drafts = progress.length - 1 - drafting.anchor
    ends = finishes(shape, request, progress.state, progress.length[:, None])[:, 0] & (drafts > 0)
    return (drafting.anchor >= 0) & ((drafts >= drafting.limit) | ends) & ~progress.done


def _note_distributions(progress: Progress, rows) -> Drafting:
    """Keeps the distributions that the next drafts of some rows are drawn from."""
    drafting = progress.drafting
    index = progress.length - 1 - drafting.anchor
    index = jnp.where(rows & (drafting.anchor >= 0), index, drafting.log_p.shape[1])
    note = jax.vmap(lambda kept, log_p, i: kept.at[i].set(log_p, mode="drop"))
    return drafting._replace(log_p=on_rows(note, drafting.log_p, progress.next_log_p, index))
