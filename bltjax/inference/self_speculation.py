"""Self-speculation: a row drafts bytes past the end of its patch, and one pass verifies them.

BLT-S (Kallini et al. 2026, algorithm 2), without training: a row whose patch is complete does not
wait for the global stack but goes on with the last patch that it has. After some drafts the global
stack reads all patches that they completed, in one call, and one pass of the decoder over the
drafted positions says which of them stand. Greedy text is that of plain decoding; drawn text has
the same distribution (`sampling.leftover`). How many drafts a row makes follows how many stood.
"""

import jax
import jax.numpy as jnp

from bltjax.inference import model_steps
from bltjax.inference.row_state import (
    ACCEPT,
    NEVER,
    Plan,
    Progress,
    Request,
    append,
    close_all,
    counted,
    finishes,
    next_distributions,
    quorum,
    take_each,
)
from bltjax.inference.sampling import leftover, row_keys
from bltjax.ops.slots import below, on_rows, read_positions, span

PATCHES_AT_ONCE = 2  # that drafts completed, in a call of the global stack


def drafting_step(plan: Plan, params, request: Request, progress: Progress) -> Progress:
    """A byte, or a draft of one, for each row that does not wait to have its drafts verified."""
    drafting = progress.anchor >= 0
    goes_on = ~progress.done & ~_stalled(request, progress)
    progress = progress._replace(draft_log_p=on_rows(_note_draft, *_draft_slots(progress, goes_on)))
    progress = append(plan, params, request, progress, goes_on)
    last = progress.length - 1
    finished = finishes(request, progress.state, progress.length[:, None])[:, 0]
    done = progress.done | (finished & ~drafting)
    starts = (model_steps.num_waiting(progress.state, last) > 0) & ~drafting & ~done
    progress = progress._replace(done=done, anchor=jnp.where(starts, last, progress.anchor))
    stalled = _stalled(request, progress)
    calls = quorum(plan, stalled, done)
    progress = jax.lax.cond(
        calls,
        lambda progress: _verify(plan, params, request, progress, stalled),
        lambda progress: progress,
        progress,
    )
    settled = stalled | done  # these know what follows, or wait to
    return jax.lax.cond(
        settled.all(),
        lambda progress: progress,
        lambda progress: _predict_one(plan, params, request, progress, ~settled),
        progress,
    )


def _predict_one(plan, params, request, progress, rows) -> Progress:
    last = progress.length - 1
    count = rows.astype(jnp.int32)
    logits, state = model_steps.predict(plan.configs, params, progress.state, last, count, 1)
    log_p = next_distributions(request, state, progress.length, logits, progress.first_seen)[:, 0]
    return progress._replace(
        state=state,
        next_log_p=jnp.where(rows[:, None], log_p, progress.next_log_p),
        redraw=progress.redraw & ~rows,
    )


def _verify(plan, params, request, progress, rows) -> Progress:
    """Lets the drafts of some rows stand as far as the full model would have drawn them."""
    last = progress.length - 1
    drafts = jnp.where(rows, last - progress.anchor, 0)
    first = jnp.where(rows, progress.anchor, last)
    state, calls = close_all(plan, params, progress.state, last, 2, rows)
    count = jnp.where(rows, drafts + 1, 0)
    logits, state = model_steps.predict(
        plan.configs, params, state, first, count, plan.max_drafts + 1
    )
    target = next_distributions(request, state, first + 1, logits, progress.first_seen)
    positions = span(first + 1, 0, plan.max_drafts)
    tokens = read_positions(state.record.tokens, positions)
    ends = finishes(request, state, positions + 1)
    accepted, next_log_p = on_rows(
        _accept,
        tokens,
        target,
        progress.draft_log_p,
        drafts,
        request.seeds,
        first,
        progress.rounds,
    )
    stand = below(accepted, plan.max_drafts)
    done = (stand & ends).any(axis=1)
    kept = jnp.where(done, jnp.argmax(stand & ends, axis=1) + 1, accepted)
    length = jnp.where(rows, first + 1 + kept, progress.length)
    whole = accepted == drafts
    limit = jnp.where(whole, jnp.minimum(2 * progress.draft_limit, plan.max_drafts), accepted + 1)
    forgotten = progress.first_seen >= length[:, None]
    counts = progress.counts
    return progress._replace(
        state=model_steps.step_back(state, length - 1),
        length=length,
        next_log_p=jnp.where(rows[:, None], next_log_p, progress.next_log_p),
        redraw=jnp.where(rows, ~whole, progress.redraw),
        done=progress.done | (rows & done),
        first_seen=jnp.where(forgotten, NEVER, progress.first_seen),
        anchor=jnp.where(rows, -1, progress.anchor),
        draft_limit=jnp.where(rows, limit, progress.draft_limit),
        rounds=progress.rounds + rows,
        counts=counted(counts, global_calls=calls, drafted=drafts, accepted=kept * rows),
    )


def _accept(tokens, target, drafted, num_drafts, seeds, first, rounds):
    """How many drafts of each row stand, int32 [B], and what the id after them is drawn from.

    tokens int32 [B, k] were drawn from drafted [B, k, V]; target [B, k + 1, V].
    """
    keys = row_keys(seeds, first, rounds, jnp.full_like(first, ACCEPT))
    uniform = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(keys)
    of_drafts = (
        jnp.take_along_axis(x[:, : tokens.shape[1]], tokens[..., None], -1)[..., 0]
        for x in (target, drafted)
    )
    target_p, drafted_p = map(jnp.exp, of_drafts)
    fits = (uniform * drafted_p < target_p) & below(num_drafts, tokens.shape[1])
    accepted = jnp.cumprod(fits, axis=1).sum(axis=1).astype(jnp.int32)
    following = take_each(target, accepted)
    refused = take_each(drafted, jnp.minimum(accepted, tokens.shape[1] - 1))
    left = jnp.where((accepted < num_drafts)[:, None], leftover(following, refused), following)
    return accepted, left


def _stalled(request, progress):
    """Rows whose drafts are as many as they may be, or reach an end."""
    drafts = progress.length - 1 - progress.anchor
    ends = finishes(request, progress.state, progress.length[:, None])[:, 0] & (drafts > 0)
    return (progress.anchor >= 0) & ((drafts >= progress.draft_limit) | ends) & ~progress.done


def _draft_slots(progress, goes_on):
    """Where the distribution of the next draft is kept; outside for rows that make none."""
    slots = progress.length - 1 - progress.anchor
    slots = jnp.where(goes_on & (progress.anchor >= 0), slots, progress.draft_log_p.shape[1])
    return progress.draft_log_p, progress.next_log_p, slots


def _note_draft(kept, log_p, slots):
    return jax.vmap(lambda kept, log_p, slot: kept.at[slot].set(log_p, mode="drop"))(
        kept, log_p, slots
    )
