"""Patch starts in rows that hold several documents."""

import jax
import jax.numpy as jnp

from bltjax.config import PatchingConfig
from bltjax.patching.boundaries import limit_patch_length, starts_after
from bltjax.vocabulary import BOS_ID, PAD_ID

Array = jax.Array


def row_starts(
    patching: PatchingConfig, tokens: Array, entropies: Array | None, document_ids: Array
) -> Array:
    """Returns patch starts bool [B, L+1] in rows of documents, each patched as if it stood alone.

    tokens, document_ids: int32 [B, L], as in packed rows. entropies: nats [B, L], each
    computed without sight of other documents; None for rules that need none. Padding and the
    position after the last byte are one patch. A document that begins before the row has starts
    where it enters, at the position after, and then where the rule says; the static rule and
    max_patch_length count from where it enters. Raises ValueError as `patch_starts` does.
    """
    age, has_begun = place_in_document(tokens, document_ids)
    opens = starts_after(patching, tokens, entropies, age, has_begun)
    starts = (age == 0) | jnp.concatenate([opens[:, :1], opens[:, :-1]], axis=1)
    if patching.max_patch_length is not None:
        starts = limit_patch_length(starts, patching.max_patch_length)
    return _with_tail(starts, tokens)


def place_in_document(tokens, document_ids):
    """Returns how many positions of its document are before each, and whether that is all of them.

    int32 and bool [B, L].
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    previous = jnp.concatenate([document_ids[:, :1], document_ids[:, :-1]], axis=1)
    first = _last_where(document_ids != previous, positions)
    return positions - first, _last_where(tokens == BOS_ID, positions, none=-1) == first


def _last_where(condition, positions, none=0):
    """Returns the last position so far where the condition held."""
    return jax.lax.cummax(jnp.where(condition, positions, none), axis=1)


def _with_tail(starts, tokens):
    """Returns starts [B, L+1] from those of inputs [B, L]: padding is the last patch."""
    num_inputs = jnp.sum(tokens != PAD_ID, axis=1, keepdims=True)
    starts = jnp.concatenate([starts, jnp.zeros_like(starts[:, :1])], axis=1)
    positions = jnp.broadcast_to(jnp.arange(starts.shape[1]), starts.shape)
    return starts & (positions < num_inputs) | (positions == num_inputs)
