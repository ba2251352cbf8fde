"""Softmax-weighted means of values that come in parts (online softmax, Milakov et al., 2018).

Sums of the parts so far are (top, total, mixed): the largest score [...], the sum of the weights
exp(score - top) [...], and the sum of the values times their weights [..., D]; all float32.
"""

import jax.numpy as jnp

MASKED = -1e30  # finite, so that parts where nothing is visible merge without NaN


def empty(mixed):
    """Returns the sums of no parts; `mixed`: zeros float32 [..., D]."""
    first = mixed[..., 0]
    return jnp.full_like(first, MASKED), jnp.zeros_like(first), mixed


def add(sums, scores, read, visible=None):
    """Adds a part with scores [..., S]; read: weights [..., S] -> weighted sum of values [..., D].

    visible: bool, broadcast to scores. None: masked scores are MASKED already, and every softmax
    has some part with a score that is not.
    """
    top, total, mixed = sums
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    weights = jnp.exp(scores - new_top[..., None])
    if visible is not None:
        weights = jnp.where(visible, weights, 0)
    kept = jnp.exp(top - new_top)
    return new_top, total * kept + weights.sum(axis=-1), mixed * kept[..., None] + read(weights)


def merge(left, right):
    """Returns the sums of both."""
    (top_l, total_l, mixed_l), (top_r, total_r, mixed_r) = left, right
    top = jnp.maximum(top_l, top_r)
    keep_l, keep_r = jnp.exp(top_l - top), jnp.exp(top_r - top)
    return (
        top,
        total_l * keep_l + total_r * keep_r,
        mixed_l * keep_l[..., None] + mixed_r * keep_r[..., None],
    )


def mean(sums):
    """Returns the weighted mean of the values [..., D]; 0 where nothing was visible."""
    _, total, mixed = sums
    return mixed / jnp.where(total > 0, total, 1)[..., None]
