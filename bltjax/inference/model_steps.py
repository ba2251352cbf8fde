"""A few positions of each row through the models: read them, close patches, predict what follows.

`Models` is what does not change, `State` what does. Positions `first` .. `first + count - 1` of a
row are new, of at most `num_new`; to read positions again is harmless (see `model/incremental.py`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.config import BLTConfig, EntropyModelConfig, PatchingConfig
from bltjax.model import functional
from bltjax.model.cache import BLTCache, Room, Stack, new_blt_cache, new_entropy_cache
from bltjax.model.incremental import ngram_reach
from bltjax.model.unstacked import unstacked
from bltjax.ops.slots import read_positions, span
from bltjax.patching.boundaries import needs_entropies
from bltjax.patching.incremental import Record, new_record, note_lines, note_starts


class Configs(NamedTuple):
    """What programs are compiled for."""

    blt: BLTConfig
    entropy_model: EntropyModelConfig | None  # None: the patching rule needs none
    patching: PatchingConfig

    @property
    def needs_entropies(self) -> bool:
        return needs_entropies(self.patching)


class State(NamedTuple):
    record: Record
    blt: BLTCache
    entropy_model: Stack | None


def prepared(params: dict) -> dict:
    """Parameters as loops on CPUs like them; elsewhere a copy would only cost memory."""
    if jax.sharding.get_mesh().devices.flat[0].platform != "cpu":
        return params
    return {name: jax.jit(unstacked)(tree) for name, tree in params.items()}


def new_state(configs: Configs, room: Room, tokens: jax.Array) -> State:
    """Nothing of the tokens int32 [B, C] has been read."""
    entropy_cache = None
    if configs.needs_entropies:
        entropy_cache = new_entropy_cache(configs.entropy_model, room)
    return State(new_record(tokens), new_blt_cache(configs.blt, room), entropy_cache)


def read(configs: Configs, params, state: State, first, count, num_new) -> State:
    """Entropies, patch starts and byte states of new positions."""
    record, entropy_cache = state.record, state.entropy_model
    positions = span(first, 0, num_new)
    tokens = read_positions(record.tokens, positions)
    entropies = jnp.zeros_like(tokens, jnp.float32)
    if configs.needs_entropies:
        lines = jnp.zeros_like(tokens)
        if configs.patching.reset_at_newlines:
            record = note_lines(record, first, count, num_new)
            lines = read_positions(record.line_starts, positions)
        entropies, entropy_cache = functional.read_entropies(
            configs.entropy_model,
            params["entropy_model"],
            entropy_cache,
            tokens,
            first,
            count,
            lines,
        )
    record = note_starts(configs.patching, record, first, count, entropies)
    earlier = span(first, -ngram_reach(configs.blt), 0)
    before = jnp.where(earlier >= 0, read_positions(record.tokens, earlier), 0)
    opens = read_positions(record.start_positions, _patch_of(record, positions)) == positions
    cache = functional.read_bytes(
        configs.blt, params["blt"], state.blt, tokens, before, first, count, opens
    )
    return State(record, cache, entropy_cache)


def num_waiting(state: State, last) -> jax.Array:
    """int32 [B]: patches that are complete at the positions `last` int32 [B] and not closed yet."""
    return num_complete(state, last) - state.blt.num_patches


def num_complete(state: State, last) -> jax.Array:
    """int32 [B]: patches that are complete once the positions `last` int32 [B] are read."""
    return _newest_closed(state.record, last[:, None])[:, 0] + 1


def close(configs: Configs, params, state: State, last, at_once: int, rows=None) -> State:
    """Runs the global stack, on at most `at_once` patches of each of the rows bool [B]."""
    count = jnp.minimum(num_waiting(state, last), at_once)
    count = count if rows is None else jnp.where(rows, count, 0)
    numbers = span(state.blt.num_patches, 0, at_once)
    starts_at = functools.partial(read_positions, state.record.start_positions)
    window = configs.blt.cross_attention.window_encoder or 1
    cache = functional.close_patches(
        configs.blt,
        params["blt"],
        state.blt,
        starts_at(numbers),
        starts_at(numbers + 1),
        starts_at(jnp.maximum(numbers - window + 1, 0)),
        count,
    )
    return state._replace(blt=cache)


def predict(configs: Configs, params, state: State, first, count, num_new: int):
    """Logits float32 [B, num_new, V] of new positions, and the state.

    A position reads the last patch that is complete, or while that one waits the last one closed.
    """
    numbers = _newest_closed(state.record, span(first, 0, num_new))
    numbers = jnp.minimum(numbers, state.blt.num_patches[:, None] - 1)
    logits, cache = functional.predict(
        configs.blt, params["blt"], state.blt, num_new, first, count, numbers
    )
    return logits, state._replace(blt=cache)


def step_back(state: State, last) -> State:
    """Forgets what follows the positions `last` int32 [B]."""
    num_patches = jnp.minimum(state.blt.num_patches, num_complete(state, last))
    return state._replace(blt=state.blt._replace(num_patches=num_patches))


def _newest_closed(record: Record, positions):
    """Number of the last patch that is complete once positions [B, T] are read; the first is 0."""
    return read_positions(record.num_starts, positions) - 2


def _patch_of(record: Record, positions):
    """Number of the patch that positions [B, T] are in."""
    before = read_positions(record.num_starts, positions - 1) - 1
    return jnp.where(positions > 0, before, 0)
