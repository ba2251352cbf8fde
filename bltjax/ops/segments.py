"""Beginnings and ends of the documents of packed rows, in the forms that attention kernels take.

segments int32 [B, L]: a document is a run of equal ids, which never decrease along a row; the
padding at the end of a row is such a run too, so that every position lies in a document.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Documents(NamedTuple):
    """The documents of all rows of a device, one after the other as if its rows were one row."""

    lengths: jax.Array  # int32 [B, most]: positions of each, then zeros
    offsets: jax.Array  # int32 [B, most + 1]: where each begins, in 0 .. B*L - 1, then B*L
    fits: jax.Array  # bool [B], equal: whether these are all, for there are at most B*most


def documents(segments: jax.Array, most: int) -> Documents:
    """Lists the documents of rows [B, L], at most `most` a row on average.

    Where there are more, lengths and offsets mean nothing.
    """
    batch, length = segments.shape
    positions, size = batch * length, batch * most
    opens = _opens(segments).reshape(positions)
    number = jnp.cumsum(opens, dtype=jnp.int32) - 1
    slots = jnp.where(opens, number, size + 1)
    offsets = jnp.full(size + 1, positions, jnp.int32)
    offsets = offsets.at[slots].set(jnp.arange(positions, dtype=jnp.int32), mode="drop")
    rest = jnp.full(batch - 1, positions, jnp.int32)
    return Documents(
        jnp.diff(offsets).reshape(batch, most),
        jnp.concatenate([offsets, rest]).reshape(batch, most + 1),
        jnp.broadcast_to(number[-1] < size, (batch,)),
    )


def key_starts(segments: jax.Array, window: int | None = None) -> jax.Array:
    """Returns the first position that each position sees: int32 [B, L].

    window: positions that it sees at most, itself included; None: all of its document before it.
    """
    positions = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    starts = jax.lax.cummax(jnp.where(_opens(segments), positions, 0), axis=1)
    return starts if window is None else jnp.maximum(starts, positions - window + 1)


def _opens(segments):
    """Tells which positions are the first of a document: bool [B, L]."""
    first = jnp.ones_like(segments[:, :1], bool)
    return jnp.concatenate([first, segments[:, 1:] != segments[:, :-1]], axis=1)
