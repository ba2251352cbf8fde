"""Rows of blocks in the decoder: bytes that it fills in together (model.md#blocks).

The clean state of the last byte before the first unknown one holds what the encoder and the n-gram
tables say of the bytes to come: unknown bytes start from it, each with a vector of its distance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax import sharding
from bltjax.config import BLTConfig
from bltjax.model.transformer import attention_of, rotary_of
from bltjax.ops.block_attention import block_attention
from bltjax.ops.rotary import lay_out
from bltjax.ops.slots import span
from bltjax.vocabulary import MASK_ID


class Blocks(NamedTuple):
    """Blocks of K bytes of B rows of L bytes: M in each of S tiles of a row.

    A block of tile s starts at one of the positions s C + 1 .. (s + 1) C, C = L / S rounded up;
    with a single tile it may start anywhere. Starts and patch_ids never decrease along a row.
    """

    starts: jax.Array  # int32 [B, S, M]  position of the first byte
    ids: jax.Array  # int32 [B, S, M, K]  bytes of the block; MASK_ID where one is to be found
    patch_ids: jax.Array  # int32 [B, S, M]  last patch that is complete before the block; -1: none


def in_rows(x, block: int = 1):
    """Puts what blocks have one after the other, [B, S, M] or [B, S, M, K] -> [B, S M K].

    block: how often what a block has once is repeated.
    """
    if block > 1:
        x = jnp.broadcast_to(x[..., None], (*x.shape, block))
    return x.reshape(len(x), -1)


def num_known(ids):
    """Returns int32 [...]: how many ids [..., K] there are before the first MASK_ID."""
    return jnp.cumprod(ids != MASK_ID, axis=-1, dtype=jnp.int32).sum(axis=-1)


def sources(starts, ids):
    """Returns positions int32 [..., K] whose encoder states the rows of blocks start from.

    Also the distances int32 [..., K] of the rows from them: 0 of the bytes that are known up to the
    first unknown one; all later rows start from the last of these, or from the byte before the
    block. starts: int32 [...]; ids: int32 [..., K].
    """
    known = num_known(ids)[..., None]
    offsets = span(jnp.zeros_like(starts), 0, ids.shape[-1])
    last = jnp.minimum(offsets, known - 1)
    return starts[..., None] + last, offsets - last


def start_rows(states, embedded, ids, distances, mask):
    """Returns what rows [B, N, E] of ids int32 [B, N] start from.

    states: encoder states [B, N, E] of their `sources`, to which unknown bytes add the vector of
    their distance, of mask [K, E]. embedded: [B, N, E]; known bytes after unknown ones start from
    it, for the states of these hold the unknown ones.
    """
    vectors = jnp.pad(mask, ((1, 0), (0, 0)))
    rows = states + sharding.lookup(vectors, distances).astype(states.dtype)
    return jnp.where(((ids != MASK_ID) & (distances > 0))[..., None], embedded, rows)


def block_of_rows_and_blocks(config: BLTConfig, segments, blocks: Blocks):
    """Returns run_block(block, (h, rows)) for byte states h [B, L, E] and rows [B, S M K, E].

    It does with h what that of `block_of_rows` does; the rows read the keys and values of h.
    """
    stack = config.local_decoder
    factors, attend = attention_of(stack, segments, config)
    positions = in_rows(span(blocks.starts, 0, blocks.ids.shape[-1]))
    factors_of_blocks = (lay_out(rotary_of(stack, positions)),) * 2

    def run_block(block, both):
        h, rows = both
        kept = []

        def attend_and_keep(q, k, v):
            kept.extend((k, v))
            return attend(q, k, v)

        def attend_in_blocks(q, k, v):
            return block_attention(q, k, v, *kept, blocks.starts, segments, stack.window)

        h = block(h, factors, attend_and_keep)
        return h, block(rows, factors_of_blocks, attend_in_blocks)

    return run_block
