"""What generation keeps of the positions that were read, in arrays of static shape (spec 9.2).

Byte stacks keep a window of keys and values, the global stack those of all patches. What is needed
of the bytes of an open patch, and of the newest patches, lies in slots by position modulo their
number, so a row may step back by fewer positions than there are slots.

Letters: B rows, G key/value heads, D head width, C positions, E local width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig, TransformerConfig


class Room(NamedTuple):
    """How much caches hold; all static."""

    rows: int
    positions: int  # C
    patches: int
    at_once: int  # positions that are read at once, or stepped back over, at most
    steps_back: int  # positions that a row may step back over, at most


class KeysValues(NamedTuple):
    """Of one layer; each layer has its own, so that none is copied to be read or written."""

    keys: jax.Array  # [B, G, slots, D]
    values: jax.Array


Stack = tuple[KeysValues, ...]  # one for each layer


class BLTCache(NamedTuple):
    encoder: Stack  # rings
    byte: Stack  # of the encoder's cross-attention, for all positions
    states: jax.Array  # [B, S, E]  byte states, by position modulo S
    pooled: jax.Array  # float32 [B, S, E]  of a patch's bytes up to a position, modulo S
    patch: Stack  # stores of the global stack
    read: Stack  # of the decoder's cross-attention: K vectors for each of the newest S patches
    patch_states: jax.Array  # [B, S, E]  the newest patches, for a decoder without cross-attention
    decoder: Stack  # rings
    num_patches: jax.Array  # int32 [B]  that went through the global stack


def new_blt_cache(config: BLTConfig, room: Room) -> BLTCache:
    """Nothing has been read."""
    dtype, cross = jnp.dtype(config.compute_dtype), config.cross_attention
    local, slots = config.local_encoder.dim, room.at_once + 1
    patch_slots = slots + (cross.window_decoder or 1)

    def keys_values(num_layers, heads, num_slots, width):
        return _stack(num_layers, (room.rows, heads, num_slots, width), dtype)

    byte_layers = cross.encoder * _num_layers(config.local_encoder, cross.all_layers_encoder)
    read_layers = cross.decoder * _num_layers(config.local_decoder, cross.all_layers_decoder)
    stack = config.global_transformer
    return BLTCache(
        encoder=_ring(config.local_encoder, room, dtype),
        byte=keys_values(
            byte_layers, cross.encoder_heads[1], room.positions, local // cross.encoder_heads[0]
        ),
        states=_zeros((room.rows, slots, local), dtype),
        pooled=_zeros((room.rows, slots, local), jnp.float32),
        patch=keys_values(stack.num_layers, stack.kv_heads, room.patches, stack.head_width),
        read=keys_values(
            read_layers,
            cross.decoder_heads[1],
            patch_slots * cross.k,
            local // cross.decoder_heads[0],
        ),
        patch_states=_zeros((room.rows, 0 if cross.decoder else patch_slots, local), dtype),
        decoder=_ring(config.local_decoder, room, dtype),
        num_patches=_zeros((room.rows,), jnp.int32),
    )


def new_entropy_cache(config: EntropyModelConfig, room: Room) -> Stack:
    """Rings of the entropy model; nothing has been read."""
    return _ring(config.transformer, room, jnp.dtype(config.compute_dtype))


def _num_layers(stack: TransformerConfig, all_layers: bool) -> int:
    return stack.num_layers if all_layers else 1


def _ring(stack: TransformerConfig, room: Room, dtype) -> Stack:
    # As many slots as are written at once, and the positions stepped back over beside the window.
    slots = min(max(stack.window + room.steps_back, room.at_once), room.positions)
    return _stack(stack.num_layers, (room.rows, stack.kv_heads, slots, stack.head_width), dtype)


def _stack(num_layers: int, shape, dtype) -> Stack:
    spec = sharding.spec("batch", "heads", None, None)

    def zeros():
        return jnp.zeros(shape, dtype, out_sharding=spec)

    return tuple(KeysValues(zeros(), zeros()) for _ in range(num_layers))


def _zeros(shape, dtype):
    return jnp.zeros(shape, dtype, out_sharding=sharding.batch_spec(len(shape)))
