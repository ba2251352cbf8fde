"""Generation on the device: the loop that reads prompts and the loop that writes bytes (spec 9.2).

The global stack runs once per patch. Rows of a batch close patches at different times, so a row
whose patch is complete waits while the others go on, until a quorum of rows waits; one call of the
global stack then serves them all. What a row yields depends on no other row. With drafts a row does
not wait, see `self_speculation.py`.
"""

import functools

import jax
import jax.numpy as jnp

from bltjax.inference import model_steps
from bltjax.inference.row_state import (
    Plan,
    Progress,
    Request,
    append,
    close_all,
    counted,
    finishes,
    first_seen,
    next_distributions,
    quorum,
    take_each,
)
from bltjax.inference.self_speculation import drafting_step
from bltjax.ops.slots import on_rows

PATCHES_AT_ONCE = 32  # of a prompt, in a call of the global stack


@functools.partial(jax.jit, static_argnums=0)
def prefill(plan: Plan, params, tokens, request: Request) -> Progress:
    """Reads prompts, in tokens int32 [B, C], in pieces, up to the distribution of the next id."""
    state = model_steps.new_state(plan.configs, plan.room, tokens)
    lengths, num_new = request.prompt_lengths, plan.room.at_once

    def read_piece(carry):
        state, first, logits = carry
        count = jnp.minimum(lengths - first, num_new)
        state = model_steps.read(plan.configs, params, state, first, count, num_new)
        state = close_all(plan, params, state, first + count - 1, PATCHES_AT_ONCE)[0]
        piece, state = model_steps.predict(plan.configs, params, state, first, count, num_new)
        last = on_rows(take_each, piece, jnp.maximum(count - 1, 0))
        return state, first + count, jnp.where((count > 0)[:, None], last, logits)

    zeros = jnp.zeros_like(lengths)
    no_logits = jnp.zeros_like(tokens[:, :1], jnp.float32)
    no_logits = no_logits.repeat(plan.configs.blt.vocab_size, axis=1)
    state, _, logits = jax.lax.while_loop(
        lambda carry: (carry[1] < lengths).any(), read_piece, (state, zeros, no_logits)
    )
    seen = on_rows(first_seen, tokens, lengths)
    never = zeros < 0
    return Progress(
        state=state,
        length=lengths,
        next_log_p=next_distributions(request, state, lengths, logits[:, None], seen)[:, 0],
        drawable=~never,
        redraw=never,
        done=lengths >= request.stop_at,
        first_seen=seen,
        anchor=zeros - 1,
        draft_log_p=jnp.zeros_like(logits[:, None].repeat(plan.max_drafts, axis=1)),
        draft_limit=zeros + plan.max_drafts,
        rounds=zeros,
        counts=dict(
            steps=jnp.int32(0),  # of the entropy model, encoder and decoder, all rows together
            global_calls=jnp.int32(0),  # all rows together
            drafted=zeros,
            accepted=zeros,
            prompt_patches=state.blt.num_patches,
        ),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(plan: Plan, params, progress: Progress, request: Request, max_steps) -> Progress:
    """Writes bytes until all rows are done, for at most so many steps, a byte per row and step."""
    last_step = progress.counts["steps"] + max_steps

    def at_work(progress):
        return ~progress.done.all() & (progress.counts["steps"] < last_step)

    step = _plain_step if plan.max_drafts == 0 else drafting_step
    return jax.lax.while_loop(at_work, functools.partial(step, plan, params, request), progress)


def _plain_step(plan: Plan, params, request: Request, progress: Progress) -> Progress:
    """A byte for each row that does not wait; the global stack where enough rows wait."""
    progress = append(plan, params, request, progress, progress.drawable & ~progress.done)
    done = finishes(request, progress.state, progress.length[:, None])[:, 0]
    last = progress.length - 1
    waits = (model_steps.num_waiting(progress.state, last) > 0) & ~done
    calls = quorum(plan, waits, done)
    state = jax.lax.cond(
        calls,
        lambda state: model_steps.close(plan.configs, params, state, last, 1, waits),
        lambda state: state,
        progress.state,
    )
    logits, state = model_steps.predict(plan.configs, params, state, last, jnp.ones_like(last), 1)
    seen = progress.first_seen
    return progress._replace(
        state=state,
        next_log_p=next_distributions(request, state, progress.length, logits, seen)[:, 0],
        drawable=~waits | calls,
        done=done,
        counts=counted(progress.counts, global_calls=calls),
    )
