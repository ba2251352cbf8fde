"""Patches as static arrays, so that a step compiles once whatever the text (model.md#patches)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class PatchBuffers(NamedTuple):
    """The patches of B rows of L bytes, in P columns; unused columns come last.

    Patches cover L + 1 positions: the last one is the byte to predict after the row.
    """

    encoder_ids: Array  # int32 [B, L]  patch that contains byte t
    decoder_ids: Array  # int32 [B, L]  last patch that is complete once byte t is read; -1: none
    starts: Array  # int32 [B, P]  position of the first byte; L + 1 in unused columns
    lengths: Array  # int32 [B, P]  bytes; rows sum to L + 1; 0 in unused columns
    mask: Array  # bool [B, P]  column is used
    overflow: Array  # int32 [B]  patches that were merged into the last column


def buffers_from_lengths(lengths: Array, num_bytes: int) -> PatchBuffers:
    """Returns the buffers of patch lengths [B, P], whose rows sum to num_bytes + 1.

    Zero lengths stand on the right only.
    """
    lengths = lengths.astype(jnp.int32)
    starts = _exclusive_cumsum(lengths)
    # Unused columns all start at num_bytes + 1, which the sum drops as out of range.
    starts_at = _segment_sum(jnp.ones_like(starts), starts, num_bytes + 1)
    ids = jnp.cumsum(starts_at, axis=-1) - 1
    return _buffers(ids, lengths, overflow=jnp.zeros_like(lengths[:, 0]))


def buffers_from_starts(starts: Array, num_patches: int) -> PatchBuffers:
    """Returns the buffers of patch starts, bool [B, L+1], in `num_patches` columns.

    Position 0 starts a patch in any case. Where a row has more patches than columns, the last
    column takes all bytes that are left, and `overflow` counts the patches merged into it.
    """
    counts = jnp.cumsum(starts, axis=-1, dtype=jnp.int32)
    ids = counts - counts[:, :1]  # The first position opens patch 0 even if it is not marked.
    overflow = jnp.maximum(ids[:, -1] - (num_patches - 1), 0)
    ids = jnp.minimum(ids, num_patches - 1)
    return _buffers(ids, _segment_sum(jnp.ones_like(ids), ids, num_patches), overflow)


def _buffers(ids: Array, lengths: Array, overflow: Array) -> PatchBuffers:
    """Assembles buffers from the patch of every position, ids [B, L+1], and lengths [B, P]."""
    return PatchBuffers(
        encoder_ids=ids[:, :-1],
        decoder_ids=ids[:, 1:] - 1,
        starts=_exclusive_cumsum(lengths),
        lengths=lengths,
        mask=lengths > 0,
        overflow=overflow,
    )


def _exclusive_cumsum(x: Array) -> Array:
    return jnp.cumsum(x, axis=-1) - x


def _segment_sum(x: Array, ids: Array, num_segments: int) -> Array:
    # A vmap over rows: a sharded batch needs no out_sharding, and rows never exchange data.
    row_sum = functools.partial(
        jax.ops.segment_sum, num_segments=num_segments, indices_are_sorted=True
    )
    return jax.vmap(row_sum)(x, ids)
