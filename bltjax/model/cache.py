"""Caches of generation: static arrays for the positions that were read (model.md#generation).

Local stacks keep keys and values of their window in a ring: position p in slot p modulo the number
of slots. The global stack keeps those of all patches. Byte states, pooled bytes of the open patch
and the newest patches lie in rings too, so a row may step back by fewer positions than there are
slots.

Letters: B rows, G key/value heads, D head width, C positions, E local width, S slots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig, TransformerConfig
from bltjax.ops import platform
from bltjax.ops.cached_attention import Cache


class CacheSize(NamedTuple):
    """Sizes of the caches; all static."""

    rows: int
    positions: int  # C
    patches: int
    chunk: int  # positions that are read at once, at most
    max_rewind: int  # positions that a row may step back over


# Keys and values of each layer [B, G, S, D], see `ops/cached_attention.py`. Arrays for each layer
# avoid a copy of the whole stack per access.
Stack = tuple[Cache, ...]


class PlainCache(NamedTuple):
    """Cache of a transformer without patches."""

    layers: Stack
    states: jax.Array  # [B, S, E]  of the last layer, by position modulo S


class BLTCache(NamedTuple):
    """Cache of a byte latent transformer."""

    encoder: Stack  # rings
    byte: Stack  # of the encoder's cross-attention, for all positions
    states: jax.Array  # [B, S, E]  of bytes, by position modulo S
    pooled: jax.Array  # float32 [B, S, E]  a patch's bytes up to each position, pooled
    patch: Stack  # of the global stack, for all patches
    read: Stack  # of the decoder's cross-attention: K vectors of each of the newest patches
    patch_states: jax.Array  # [B, S, E]  the newest patches, for a decoder without cross-attention
    decoder: Stack  # rings
    num_patches: jax.Array  # int32 [B]  read by the global stack


def new_blt_cache(config: BLTConfig, size: CacheSize) -> BLTCache:
    """Returns the cache of rows of which nothing has been read."""
    dtype, cross = jnp.dtype(config.compute_dtype), config.cross_attention
    local, slots = config.local_encoder.dim, size.chunk + 1
    patch_slots = slots + (cross.window_decoder or 1)

    def crossed(num_layers, heads, num_slots):
        num_heads, num_kv_heads = heads
        return _stack(num_layers, (size.rows, num_kv_heads, num_slots, local // num_heads), dtype)

    byte_layers = cross.encoder * _num_layers(config.local_encoder, cross.all_layers_encoder)
    read_layers = cross.decoder * _num_layers(config.local_decoder, cross.all_layers_decoder)
    stack = config.global_transformer
    patch_shape = size.rows, stack.kv_heads, size.patches, stack.head_width
    return BLTCache(
        encoder=new_ring(config.local_encoder, size, dtype),
        byte=crossed(byte_layers, cross.encoder_heads, size.positions),
        states=_zeros((size.rows, slots, local), dtype),
        pooled=_zeros((size.rows, slots, local), jnp.float32),
        patch=_stack(stack.num_layers, patch_shape, dtype),
        read=crossed(read_layers, cross.decoder_heads, patch_slots * cross.k),
        patch_states=_zeros((size.rows, 0 if cross.decoder else patch_slots, local), dtype),
        decoder=new_ring(config.local_decoder, size, dtype),
        num_patches=_zeros((size.rows,), jnp.int32),
    )


def new_plain_cache(config: EntropyModelConfig, size: CacheSize) -> PlainCache:
    """Returns the cache of rows of which nothing has been read, for a model without patches."""
    stack, dtype = config.transformer, jnp.dtype(config.compute_dtype)
    states = _zeros((size.rows, size.chunk, stack.dim), dtype)
    return PlainCache(new_ring(stack, size, dtype), states)


def _num_layers(stack: TransformerConfig, all_layers: bool) -> int:
    return stack.num_layers if all_layers else 1


def new_ring(stack: TransformerConfig, size: CacheSize, dtype) -> Stack:
    """Returns empty keys and values for the window of a stack; without a window, for all."""
    window = stack.window or size.positions
    # The positions stepped back over lie beside the window.
    slots = min(window + size.max_rewind, size.positions)
    return _stack(stack.num_layers, (size.rows, stack.kv_heads, slots, stack.head_width), dtype)


def _stack(num_layers: int, shape, dtype) -> Stack:
    arrays = 2
    if platform.platform() != "cpu":
        arrays, shape = 1, (*shape[:-1], 2 * shape[-1])
    spec = sharding.spec("batch", "heads", None, None)
    zeros = functools.partial(jnp.zeros, shape, dtype, out_sharding=spec)
    return tuple(tuple(zeros() for _ in range(arrays)) for _ in range(num_layers))


def _zeros(shape, dtype):
    return jnp.zeros(shape, dtype, out_sharding=sharding.batch_spec(len(shape)))
