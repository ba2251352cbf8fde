"""Decoders: how each kind of model reads ids and predicts the next one, a few positions at a time.

A decoder is the static part that programs are compiled for; a new kind of model is one more class
with the attributes and methods of `PlainDecoder`, the shortest one. Its state holds arrays alone.
Positions `first` .. `first + count - 1` of a row are new, of at most `num_new`; to read positions
again is harmless (see `model/incremental.py`).

A patch is complete once the byte after it is known to open the next one, and closed once the global
stack has read it. A decoder without patches has none that wait.

Letters: B rows, T positions, C positions that there is room for, V ids.
"""

import dataclasses
import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax import sharding, vocabulary
from bltjax.config import BLTConfig, EntropyModelConfig, PatchingConfig
from bltjax.data.tokenizer import Tokenizer
from bltjax.inference.memory import GIB, needed_and_free
from bltjax.inference.sampling import LARGEST
from bltjax.model import functional
from bltjax.model.cache import (
    BLTCache,
    CacheSize,
    PlainCache,
    Stack,
    new_blt_cache,
    new_plain_cache,
    new_ring,
)
from bltjax.model.incremental import ngram_reach
from bltjax.ops.slots import (
    on_rows,
    read_positions,
    read_slots,
    span,
    take_rows,
    write_positions,
    write_slots,
)
from bltjax.patching.boundaries import needs_entropies, row_threshold
from bltjax.patching.entropy import next_byte_entropy
from bltjax.patching.incremental import Record, new_record, note_lines, note_starts


def for_generation(decoder: "Decoder", params: dict) -> dict:
    """Returns the parameters of a decoder laid out for generation, see `model/prepared.py`.

    Layers are copied, in the compute dtype; embeddings and hash tables are not. Matrices are whole
    over fsdp, split over tensor alone: else a loop gathers all of them for each byte. Where the
    memory of a device has no room for that, they stay split, with a warning.
    """
    whole, parts = True, sharding.num_weight_parts(jax.sharding.get_mesh())
    if parts > 1:
        needed, free = needed_and_free(prepared_layers(decoder, params))
        if free is not None and needed > free:
            whole = False
            warnings.warn(
                f"a device has {free / GIB:.1f} GiB free, and layers that are whole over mesh.fsdp="
                f"{parts} take {needed / GIB:.1f} GiB: they are gathered for every byte, which is "
                "slow; choose a mesh with a larger tensor and fsdp=1",
                stacklevel=2,
            )
    return _prepare(decoder, whole, params)


def prepared_types(decoder: "Decoder", params: dict) -> dict:
    """Returns the types of `for_generation`'s result, of parameters or their types."""
    return jax.eval_shape(functools.partial(decoder.prepare, whole=True), params)


def prepared_layers(decoder: "Decoder", params: dict) -> list:
    """Returns the types of the layers in `prepared_types`."""
    types = prepared_types(decoder, params)
    found = jax.tree.leaves(types, is_leaf=lambda x: isinstance(x, tuple))
    return [x for x in found if isinstance(x, tuple)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prepare(decoder, whole, params):
    return decoder.prepare(params, whole)


class PlainState(NamedTuple):
    """State of rows under a `PlainDecoder`."""

    tokens: jax.Array  # int32 [B, C]
    num_bytes: jax.Array  # int32 [B, C]  of the ids up to each position
    cache: PlainCache

    def with_tokens(self, tokens) -> "PlainState":
        return self._replace(tokens=tokens)


@dataclasses.dataclass(frozen=True)
class PlainDecoder:
    """A transformer of the ids of a tokenizer, without patches; params: those of the model."""

    model: EntropyModelConfig
    tokenizer: Tokenizer

    ids_are_bytes = False  # else each id that can be drawn is one byte, or EOS

    @property
    def num_ids(self) -> int:
        """Number of ids that exist; the logits of the model may have more."""
        return len(self.tokenizer)

    def encode(self, text: bytes | str):
        """Returns the ids int32 [S] of a prompt, BOS first."""
        return self.tokenizer.encode(text, add_eos=False)

    def decode(self, ids) -> bytes:
        """Returns the bytes of ids [S], special ones left out."""
        return self.tokenizer.decode(ids)

    def prepare(self, params, whole: bool) -> dict:
        """Returns the parameters as `for_generation` lays them out."""
        return functional.prepare(self.model, params, whole)

    def threshold_of(self, wanted: float | None) -> float:
        """Returns the threshold of a row in nats; wanted: None for the trained one."""
        return 0.0

    def without_threshold(self) -> "PlainDecoder":
        """Returns the decoder that programs are compiled for, whatever the threshold of rows."""
        return self

    def new_state(self, size: CacheSize, tokens: jax.Array, thresholds: jax.Array) -> PlainState:
        """Returns the state before anything of the tokens int32 [B, C] is read.

        thresholds: float32 [B], of each row.
        """
        return PlainState(tokens, jnp.zeros_like(tokens), new_plain_cache(self.model, size))

    def read(self, params, state: PlainState, first, count, num_new) -> PlainState:
        """Reads new positions."""
        positions = span(first, 0, num_new)
        tokens = read_positions(state.tokens, positions)
        lengths = on_rows(lambda ids, table: table[ids], tokens, self.tokenizer.byte_lengths())
        so_far = jnp.where(first > 0, read_positions(state.num_bytes, first[:, None] - 1)[:, 0], 0)
        num_bytes = so_far[:, None] + jnp.cumsum(lengths, axis=1)
        before = _ids_before(self.model, state.tokens, first)
        new, layers = functional.read_tokens(
            self.model, params, state.cache.layers, tokens, first, count, 0, before
        )
        states = state.cache.states
        states = write_slots(states, new, positions % states.shape[1])
        return state._replace(
            num_bytes=write_positions(state.num_bytes, num_bytes, positions),
            cache=PlainCache(layers, states),
        )

    def predict(self, params, state: PlainState, first, count, num_new):
        """Returns logits float32 [B, num_new, V] after new positions, and the state."""
        states = state.cache.states
        states = read_slots(states, span(first, 0, num_new) % states.shape[1])
        return functional.token_logits(self.model, params, states)[..., : self.num_ids], state

    def predict_last(self, params, state: PlainState, first, count, num_new):
        """Returns logits float32 [B, V] after the last new position, and the state."""
        logits, state = self.predict(params, state, first + jnp.maximum(count - 1, 0), count, 1)
        return logits[:, 0], state

    def rewind(self, state: PlainState, last) -> PlainState:
        """Forgets the positions after `last` int32 [B]."""
        return state

    def num_written(self, state: PlainState, prompt_lengths, lengths):
        """Returns int32 [B, T]: bytes after the prompts, of rows with lengths int32 [B, T]."""
        prompt_bytes = read_positions(state.num_bytes, prompt_lengths[:, None] - 1)
        return read_positions(state.num_bytes, lengths - 1) - prompt_bytes

    def num_waiting(self, state: PlainState, last):
        """Returns int32 [B]: patches that are complete at positions `last` [B] and not closed."""
        return jnp.zeros_like(last)

    def close(
        self, params, state: PlainState, last, max_patches: int, rows=None, max_rows=None
    ) -> PlainState:
        """Closes at most `max_patches` waiting patches of each of the rows bool [B]; None: all.

        max_rows: close those of so many rows, or fewer, and compute nothing for the others.
        """
        return state

    def num_patches(self, state: PlainState):
        """Returns int32 [B]: patches that are closed."""
        return jnp.zeros_like(state.tokens[:, 0])

    def out_of_patches(self, state: PlainState, lengths):
        """Returns bool [B]: rows of lengths int32 [B] with more patches than there is room for."""
        return jnp.zeros_like(lengths, bool)


class BLTState(NamedTuple):
    """State of rows under a `BLTDecoder`."""

    record: Record
    blt: BLTCache
    entropy_model: Stack | None
    thresholds: jax.Array  # float32 [B]

    @property
    def tokens(self) -> jax.Array:
        return self.record.tokens

    def with_tokens(self, tokens) -> "BLTState":
        return self._replace(record=self.record._replace(tokens=tokens))


@dataclasses.dataclass(frozen=True)
class BLTDecoder:
    """A byte latent transformer that finds patches as it goes; methods as of `PlainDecoder`.

    params: {"blt": ..., "entropy_model": ...}, the latter where the patching rule needs entropies.
    """

    blt: BLTConfig
    entropy_model: EntropyModelConfig | None
    patching: PatchingConfig

    ids_are_bytes = True
    num_ids = vocabulary.VOCAB_SIZE
    encode = staticmethod(functools.partial(vocabulary.encode, add_eos=False))
    decode = staticmethod(vocabulary.decode)

    def prepare(self, params, whole: bool) -> dict:
        configs = dict(blt=self.blt, entropy_model=self.entropy_model)
        return {
            name: functional.prepare(configs[name], part, whole) if configs[name] else part
            for name, part in params.items()
        }

    def threshold_of(self, wanted: float | None) -> float:
        threshold = wanted if wanted is not None else self.patching.threshold or 0.0
        return row_threshold(self.patching, max(-LARGEST, min(threshold, LARGEST)))

    def without_threshold(self) -> "BLTDecoder":
        return dataclasses.replace(self, patching=dataclasses.replace(self.patching, threshold=0.0))

    def new_state(self, size: CacheSize, tokens: jax.Array, thresholds: jax.Array) -> BLTState:
        entropy_cache, model = None, self.entropy_model
        if needs_entropies(self.patching):
            entropy_cache = new_ring(model.transformer, size, jnp.dtype(model.compute_dtype))
        cache = new_blt_cache(self.blt, size)
        return BLTState(new_record(tokens), cache, entropy_cache, thresholds)

    def read(self, params, state: BLTState, first, count, num_new) -> BLTState:
        """Finds entropies, patch starts and byte states of new positions."""
        record, entropy_cache = state.record, state.entropy_model
        positions = span(first, 0, num_new)
        tokens = read_positions(record.tokens, positions)
        entropies = jnp.zeros_like(tokens, jnp.float32)
        if needs_entropies(self.patching):
            lines = jnp.zeros_like(tokens)
            if self.patching.reset_at_newlines:
                record = note_lines(record, first, count, num_new)
                lines = read_positions(record.line_starts, positions)
            model = self.entropy_model, params["entropy_model"]
            states, entropy_cache = functional.read_tokens(
                *model, entropy_cache, tokens, first, count, lines
            )
            entropies = next_byte_entropy(functional.token_logits(*model, states))
        patching = dataclasses.replace(self.patching, threshold=state.thresholds[:, None])
        record = note_starts(patching, record, first, count, entropies)
        before = _ids_before(self.blt, record.tokens, first)
        opens = read_positions(record.start_positions, _patch_of(record, positions)) == positions
        cache = functional.read_bytes(
            self.blt, params["blt"], state.blt, tokens, before, first, count, opens
        )
        return BLTState(record, cache, entropy_cache, state.thresholds)

    def predict(self, params, state: BLTState, first, count, num_new: int):
        """A position reads the last complete patch, or while that one waits the last closed one."""
        numbers = _newest_complete(state.record, span(first, 0, num_new))
        numbers = jnp.minimum(numbers, state.blt.num_patches[:, None] - 1)
        logits, cache = functional.predict(
            self.blt, params["blt"], state.blt, num_new, first, count, numbers
        )
        return logits[..., : self.num_ids], state._replace(blt=cache)

    def read_states(self, params, state: BLTState, first, num_new: int) -> BLTState:
        """Finds the byte states of new positions, and nothing else; `read` finds them again."""
        positions, count = span(first, 0, num_new), jnp.full_like(first, num_new)
        tokens = read_positions(state.tokens, positions)
        before = _ids_before(self.blt, state.tokens, first)
        opens = positions == self.open_patch(state, first - 1)[:, None]
        cache = functional.read_bytes(
            self.blt, params["blt"], state.blt, tokens, before, first, count, opens
        )
        return state._replace(blt=cache)

    def predict_block(self, params, state: BLTState, ids, starts):
        """Returns logits float32 [B, K, V] of a block of ids [B, K], each of the byte there.

        The byte states of those that are known must have been found.
        """
        numbers = _newest_complete(state.record, starts[:, None] - 1)[:, 0]
        logits = functional.predict_block(self.blt, params["blt"], state.blt, ids, starts, numbers)
        return logits[..., : self.num_ids]

    def open_patch(self, state: BLTState, last):
        """Returns int32 [B]: where the patch starts that the byte after positions `last` is in."""
        number = read_positions(state.record.num_starts, last[:, None]) - 1
        return read_positions(state.record.start_positions, number)[:, 0]

    def in_patch(self, state: BLTState, first, number: int):
        """Returns bool [B, number]: whether the bytes after `first` [B] are in its patch."""
        opened = read_positions(state.record.num_starts, span(first, -1, number))
        return opened[:, 1:] == opened[:, :1]

    def predict_last(self, params, state: BLTState, first, count, num_new: int):
        """Runs the local decoder on all new positions, whose keys and values later ones read."""
        logits, state = self.predict(params, state, first, count, num_new)
        take = jax.vmap(lambda row, i: row[i])
        return on_rows(take, logits, jnp.maximum(count - 1, 0)), state

    def rewind(self, state: BLTState, last) -> BLTState:
        num_patches = jnp.minimum(state.blt.num_patches, _num_complete(state, last))
        return state._replace(blt=state.blt._replace(num_patches=num_patches))

    def num_written(self, state: BLTState, prompt_lengths, lengths):
        return lengths - prompt_lengths[:, None]

    def num_waiting(self, state: BLTState, last):
        return _num_complete(state, last) - state.blt.num_patches

    def close(
        self, params, state: BLTState, last, max_patches: int, rows=None, max_rows=None
    ) -> BLTState:
        count = jnp.minimum(self.num_waiting(state, last), max_patches)
        count = count if rows is None else jnp.where(rows, count, 0)
        numbers = span(state.blt.num_patches, 0, max_patches)
        starts_at = functools.partial(read_positions, state.record.start_positions)
        window = self.blt.cross_attention.window_encoder or 1
        found = (
            starts_at(numbers),
            starts_at(numbers + 1),
            starts_at(jnp.maximum(numbers - window + 1, 0)),
            count,
        )
        chosen = None
        if max_rows is not None:
            chosen = on_rows(lambda count: jnp.argsort(count == 0)[:max_rows], count)
            found = (take_rows(x, chosen) for x in found)
        cache = functional.close_patches(self.blt, params["blt"], state.blt, *found, chosen)
        return state._replace(blt=cache)

    def num_patches(self, state: BLTState):
        return state.blt.num_patches

    def out_of_patches(self, state: BLTState, lengths):
        return _num_complete(state, lengths - 1) > state.blt.patch[0][0].shape[2]


Decoder = PlainDecoder | BLTDecoder


def _ids_before(config, tokens, first):
    """Returns int32 [B, n]: the ids before positions `first` that n-grams reach, 0 before any."""
    earlier = span(first, -ngram_reach(config), 0)
    return jnp.where(earlier >= 0, read_positions(tokens, earlier), 0)


def _num_complete(state: BLTState, last):
    """Returns int32 [B]: patches that are complete once the positions `last` [B] are read."""
    return _newest_complete(state.record, last[:, None])[:, 0] + 1


def _newest_complete(record: Record, positions):
    """Returns the number, from 0, of the last patch that is complete at positions [B, T]."""
    return read_positions(record.num_starts, positions) - 2


def _patch_of(record: Record, positions):
    """Returns the number of the patch that positions [B, T] are in."""
    before = read_positions(record.num_starts, positions - 1) - 1
    return jnp.where(positions > 0, before, 0)
