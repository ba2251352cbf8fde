"""Patch starts in rows that hold several documents."""

import dataclasses

import jax
import jax.numpy as jnp

from bltjax.config import PatchingConfig
from bltjax.patching.boundaries import limit_patch_length, patch_starts
from bltjax.vocabulary import BOS_ID, PAD_ID

Array = jax.Array


def row_starts(
    patching: PatchingConfig, tokens: Array, entropies: Array | None, document_ids: Array
) -> Array:
    """Patch starts bool [B, L+1] in rows of several documents, each patched as if it stood alone.

    tokens, document_ids: int32 [B, L], as in packed rows. entropies: nats [B, L], each
    computed without sight of other documents; None for rules that need none. Padding and the
    position after the last byte are one patch. A document that begins before the row has starts
    where it enters, at the position after, and then where the rule says; the static rule and
    max_patch_length count from where it enters. Raises ValueError as `patch_starts` does.
    """
    age, has_begun = _place_in_document(tokens, document_ids)
    starts = _rule_alone(patching, tokens, entropies)
    if patching.rule == "static":  # Counts from the row's start, and must from the document's.
        starts = age % patching.patch_size == 0
    if patching.rule in ("monotonic", "global_monotonic"):
        starts |= has_begun & (age == 2)
    if patching.rule == "global_monotonic" and patching.published_skip_at_3:
        starts &= ~(has_begun & (age == 3))
    starts |= age < 2
    if patching.max_patch_length is not None:
        starts = limit_patch_length(starts, patching.max_patch_length)
    return _with_tail(starts, tokens)


def _rule_alone(patching, tokens, entropies):
    """The rule's starts bool [B, L], as if every position were far from a document's start.

    Positions 0 and 1 of a document, which look before it, mean nothing.
    """
    plain = dataclasses.replace(patching, max_patch_length=None, published_skip_at_3=False)
    # The rules force up to three starts: the first falls on a position put before the row, the
    # others on the row's first two, which start anyway.
    before = [jnp.concatenate([x[:, :1], x], axis=1) for x in (tokens, entropies) if x is not None]
    return patch_starts(plain, *before)[:, 1:-1]


def _place_in_document(tokens, document_ids):
    """How many positions of its document are before each in the row, and whether that is all."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    previous = jnp.concatenate([document_ids[:, :1], document_ids[:, :-1]], axis=1)
    first = _last_where(document_ids != previous, positions)
    return positions - first, _last_where(tokens == BOS_ID, positions, none=-1) == first


def _last_where(condition, positions, none=0):
    """The last position so far where the condition held."""
    return jax.lax.cummax(jnp.where(condition, positions, none), axis=1)


def _with_tail(starts, tokens):
    """Starts [B, L+1] from those of inputs [B, L]: the last patch begins at the first padding."""
    num_inputs = jnp.sum(tokens != PAD_ID, axis=1, keepdims=True)
    starts = jnp.concatenate([starts, jnp.zeros_like(starts[:, :1])], axis=1)
    positions = jnp.broadcast_to(jnp.arange(starts.shape[1]), starts.shape)
    return starts & (positions < num_inputs) | (positions == num_inputs)
