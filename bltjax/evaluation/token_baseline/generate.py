"""Texts from a token model: prompts are read, then tokens written, in loops on the device.

Keys and values are cached. Rooms come in few sizes, powers of two, so that few are compiled.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax import sharding
from bltjax.config import TokenModelConfig
from bltjax.data.tokenizer import Tokenizer
from bltjax.inference.engine import AT_ONCE, room_for
from bltjax.inference.sampling import draw, row_keys
from bltjax.model import functional
from bltjax.model.cache import Room, Stack, new_entropy_cache
from bltjax.ops.slots import on_rows, read_positions, span, write_positions
from bltjax.vocabulary import BYTE_OFFSET, EOS_ID, PAD_ID

STOP_STEPS = 16  # between looks for stop strings


class Plan(NamedTuple):
    """What programs are compiled for: all static."""

    config: TokenModelConfig
    room: Room
    num_ids: int  # of the tokenizer


class Prompt(NamedTuple):
    """One row that is asked for."""

    ids: np.ndarray  # int32, BOS first
    max_new_bytes: int
    seed: int


class Request(NamedTuple):
    """What is asked of each row; does not change."""

    prompt_lengths: jax.Array  # int32 [B]
    max_new_bytes: jax.Array  # int32 [B]
    seeds: jax.Array  # uint32 [B]
    byte_lengths: jax.Array  # int32 [V], of each id
    temperature: jax.Array  # float32, 0: the most probable token, always


class Progress(NamedTuple):
    """Where the rows are."""

    cache: Stack
    tokens: jax.Array  # int32 [B, C]
    length: jax.Array  # int32 [B]  ids so far, the prompt's included
    num_bytes: jax.Array  # int32 [B]  that were written
    logits: jax.Array  # float32 [B, V]  of the id at position `length`
    done: jax.Array  # bool [B]


def generate(
    config: TokenModelConfig,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    temperature: float,
    stops: Sequence[bytes],
    batch_size: int,
) -> list[bytes]:
    """The continuation of each prompt, without EOS or stop string, at most `max_new_bytes` long."""
    # Prompts of like length share a batch: the longest decides the room of all.
    order = sorted(range(len(prompts)), key=lambda i: -_longest(prompts[i]))
    outputs = [b""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        own = [prompts[i] for i in chosen]
        texts = _batch(config, params, tokenizer, own, temperature, stops, batch_size)
        for i, text in zip(chosen, texts, strict=True):
            outputs[i] = text
    return outputs


def _batch(config, params, tokenizer, prompts, temperature, stops, batch_size) -> list[bytes]:
    shards = sharding.num_row_shards(jax.sharding.get_mesh())
    num_rows = 1 << (len(prompts) - 1).bit_length()  # few numbers of rows, too
    num_rows = -(-min(num_rows, batch_size) // shards) * shards
    capacity = room_for(max(map(_longest, prompts)))
    room = Room(num_rows, capacity, 0, min(AT_ONCE, capacity), steps_back=0)
    plan = Plan(config, room, len(tokenizer))
    filled = [*prompts, *[Prompt(prompts[0].ids[:1], 0, 0)] * (num_rows - len(prompts))]
    tokens = np.full((num_rows, capacity), PAD_ID, np.int32)
    for row, prompt in zip(tokens, filled, strict=True):
        row[: len(prompt.ids)] = prompt.ids
    lengths, limits = (
        np.array(x, np.int32)
        for x in ([len(p.ids) for p in filled], [p.max_new_bytes for p in filled])
    )
    seeds = np.array([p.seed for p in filled], np.uint32)
    here = sharding.rows_of_process(num_rows)
    tokens, *asked = sharding.put_batch([x[here] for x in (tokens, lengths, limits, seeds)])
    table = tokenizer.byte_lengths(config.vocab_size)
    request = Request(*asked, *sharding.put_whole((table, np.float32(temperature))))
    progress = prefill(plan, params, tokens, request)
    steps = sharding.put_whole(np.int32(STOP_STEPS if stops else capacity))
    while True:
        progress = decode(plan, params, progress, request, steps)
        tokens, ends, done = sharding.on_host((progress.tokens, progress.length, progress.done))
        rows = zip(prompts, tokens, ends, strict=False)  # those filled up have no prompt
        found = [
            _text(tokenizer.decode(row[len(p.ids) : end])[: p.max_new_bytes], stops)
            for p, row, end in rows
        ]
        stopped = np.array([stopped for _, stopped in found] + [True] * (num_rows - len(found)))
        if (done | stopped).all():
            return [text for text, _ in found]
        progress = progress._replace(done=sharding.put_batch((done | stopped)[here]))


def _text(text: bytes, stops: Sequence[bytes]) -> tuple[bytes, bool]:
    """The text up to the first stop string, and whether there is one."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found, default=None)], bool(found)


def _longest(prompt: Prompt) -> int:
    """Positions of a row whose every token is a single byte."""
    return len(prompt.ids) + prompt.max_new_bytes


@functools.partial(jax.jit, static_argnums=0)
def prefill(plan: Plan, params, tokens, request: Request) -> Progress:
    """Reads prompts, in tokens int32 [B, C], in pieces, up to the logits of the next id."""
    lengths, num_new = request.prompt_lengths, plan.room.at_once

    def read_piece(carry):
        cache, first, logits = carry
        count = jnp.clip(lengths - first, 0, num_new)
        piece = read_positions(tokens, span(first, 0, num_new))
        new, cache = functional.read_tokens(plan.config, params, cache, piece, first, count)
        return cache, first + count, jnp.where((count > 0)[:, None], new, logits)

    zeros = jnp.zeros_like(lengths)
    no_logits = jnp.zeros_like(tokens[:, :1], jnp.float32).repeat(plan.config.vocab_size, axis=1)
    cache, _, logits = jax.lax.while_loop(
        lambda carry: (carry[1] < lengths).any(),
        read_piece,
        (_new_cache(plan), zeros, no_logits),
    )
    return Progress(cache, tokens, lengths, zeros, logits, request.max_new_bytes <= 0)


def _new_cache(plan: Plan) -> Stack:
    """Nothing has been read. Of a model without a window a ring with room for every position."""
    stack = plan.config.transformer
    stack = dataclasses.replace(stack, window=stack.window or plan.room.positions)
    return new_entropy_cache(dataclasses.replace(plan.config, transformer=stack), plan.room)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(plan: Plan, params, progress: Progress, request: Request, max_steps) -> Progress:
    """Writes tokens until all rows are done, for at most so many steps."""

    def at_work(carry):
        step, progress = carry
        return ~progress.done.all() & (step < max_steps)

    def write(carry):
        step, progress = carry
        return step + 1, _step(plan, params, request, progress)

    return jax.lax.while_loop(at_work, write, (jnp.int32(0), progress))[1]


def _step(plan: Plan, params, request: Request, progress: Progress) -> Progress:
    """A token for each row that is not done."""

    def draw_ids(logits, seeds, length, table, temperature):
        logits = jnp.where(drawable(logits, plan.num_ids), logits, -jnp.inf)
        keys = row_keys(seeds, length)
        ids = jax.lax.cond(
            temperature > 0,
            lambda: draw(logits / jnp.maximum(temperature, 1e-30), keys),
            lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        )
        return ids, table[ids]

    ids, num_bytes = on_rows(
        draw_ids,
        progress.logits,
        request.seeds,
        progress.length,
        request.byte_lengths,
        request.temperature,
    )
    writes, capacity = ~progress.done, progress.tokens.shape[1]
    slots = jnp.where(writes, progress.length, capacity)
    tokens = write_positions(progress.tokens, ids[:, None], slots[:, None])
    num_bytes = progress.num_bytes + jnp.where(writes, num_bytes, 0)
    logits, cache = functional.read_tokens(
        plan.config,
        params,
        progress.cache,
        ids[:, None],
        progress.length,
        writes.astype(jnp.int32),
    )
    return Progress(
        cache=cache,
        tokens=tokens,
        length=progress.length + writes,
        num_bytes=num_bytes,
        logits=logits,
        done=progress.done | (ids == EOS_ID) | (num_bytes >= request.max_new_bytes),
    )


def drawable(logits, num_ids: int):
    """Which ids of logits [..., V] can be drawn: those with bytes, and EOS."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return ((ids >= BYTE_OFFSET) & (ids < num_ids)) | (ids == EOS_ID)
