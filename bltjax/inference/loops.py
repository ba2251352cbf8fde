"""Generation on the device: loops that read prompts and write ids (model.md#generation).

The global stack runs once per patch. Rows of a batch close patches at different times, so a row
whose patch is complete waits while the others go on, until a quorum of rows waits; one call of the
global stack then serves them all. What a row yields depends on no other row. With drafts a row does
not wait, see `self_speculation.py`.
"""

import functools

import jax
import jax.numpy as jnp

from bltjax.inference.row_state import (
    Drafting,
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
from bltjax.ops.slots import on_rows

PATCH_BYTES = 4  # of prompts, as a guess: patches that a call of the global stack reads at most


@functools.partial(jax.jit, static_argnums=0)
def prefill(shape: ProgramShape, params, tokens, request: RequestArrays) -> Progress:
    """Reads prompts, in tokens int32 [B, C], in chunks, up to the distribution of the next id."""
    state = shape.decoder.new_state(shape.size, tokens)
    return _read_prompts(shape, params, state, jnp.zeros_like(request.prompt_lengths), request)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(
    shape: ProgramShape, params, progress: Progress, tokens, request: RequestArrays, kept
) -> Progress:
    """Reads prompts of which the first `kept` ids int32 [B] have been read by `progress`.

    kept: from 1 on; with the last one, which is read again, rows step back by no more than
    `max_rewind`. It is, since it may have been predicted while its patch waited.
    """
    state = progress.state.with_tokens(tokens)
    state = shape.decoder.rewind(state, kept - 1)
    return _read_prompts(shape, params, state, kept - 1, request)


def _read_prompts(shape: ProgramShape, params, state, first, request: RequestArrays) -> Progress:
    """Reads prompts from positions `first` int32 [B] on."""
    decoder, num_new, tokens = shape.decoder, shape.size.chunk, state.tokens
    max_patches = -(-num_new // PATCH_BYTES)
    lengths = request.prompt_lengths

    def read_chunk(carry):
        state, first, logits = carry
        count = jnp.minimum(lengths - first, num_new)
        state = decoder.read(params, state, first, count, num_new)
        state = close_all(shape, params, state, first + count - 1, max_patches)[0]
        last, state = decoder.predict_last(params, state, first, count, num_new)
        return state, first + count, jnp.where((count > 0)[:, None], last, logits)

    zeros = jnp.zeros_like(lengths)
    no_logits = jnp.zeros_like(tokens[:, :1], jnp.float32).repeat(decoder.num_ids, axis=1)
    state, _, logits = jax.lax.while_loop(
        lambda carry: (carry[1] < lengths).any(),
        read_chunk,
        (state, first, no_logits),
    )
    seen = on_rows(lambda *rows: find_first_seen(*rows, decoder.num_ids), tokens, lengths)
    drafting = None
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
    return Progress(
        state=state,
        length=lengths,
        next_log_p=next_distributions(shape, request, state, lengths, logits[:, None], seen)[:, 0],
        done=request.max_new_bytes <= 0,
        first_seen=seen,
        num_steps=jnp.int32(0),
        num_global_calls=jnp.int32(0),
        prompt_patches=decoder.num_patches(state),
        drafting=drafting,
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(shape: ProgramShape, params, progress, request: RequestArrays, max_steps) -> Progress:
    """Writes ids until all rows are done, for at most so many steps, an id per row and step."""
    last_step = progress.num_steps + max_steps

    def at_work(progress):
        return ~progress.done.all() & (progress.num_steps < last_step)

    step = _plain_step if progress.drafting is None else drafting_step
    return jax.lax.while_loop(at_work, functools.partial(step, shape, params, request), progress)


def _plain_step(shape: ProgramShape, params, request, progress: Progress) -> Progress:
    """Appends an id to each row that does not wait; runs the global stack if enough rows wait."""
    decoder = shape.decoder
    waits = decoder.num_waiting(progress.state, progress.length - 1) > 0
    progress = append(shape, params, request, progress, ~waits & ~progress.done)
    done = finishes(shape, request, progress.state, progress.length[:, None])[:, 0]
    last = progress.length - 1
    waits = (decoder.num_waiting(progress.state, last) > 0) & ~done
    calls = enough_wait(shape, waits, done)
    state = jax.lax.cond(
        calls,
        lambda state: decoder.close(params, state, last, 1, waits),
        lambda state: state,
        progress.state,
    )
    logits, state = decoder.predict(params, state, last, jnp.ones_like(last), 1)
    seen = progress.first_seen
    return progress._replace(
        state=state,
        next_log_p=next_distributions(shape, request, state, progress.length, logits, seen)[:, 0],
        done=done,
        num_global_calls=progress.num_global_calls + calls.astype(jnp.int32),
    )
