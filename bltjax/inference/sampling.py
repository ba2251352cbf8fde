"""From logits to the next byte: what may follow, with what probability, and the draw.

A distribution is float32 log-probabilities [..., V], -inf where nothing can be drawn; greedy is the
distribution with all its mass on one id. So what draws, and what verifies drafts, knows no modes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.vocabulary import BYTE_OFFSET, VOCAB_SIZE, is_drawable


@dataclass(frozen=True)
class Sampling:
    """How bytes are chosen; the defaults are greedy. Steps come in this order."""

    repetition_penalty: float = 1.0  # logits of bytes that occurred, in the prompt too: /p or *p
    temperature: float = 0.0  # 0: the most probable byte, always
    top_k: int | None = None  # the k most probable
    top_p: float | None = None  # the most probable that together have this probability
    min_p: float | None = None  # those at least this share of the most probable
    valid_utf8: bool = False  # nothing that UTF-8 cannot hold, and no half characters at the end

    def __post_init__(self):
        _check_number(
            "temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"
        )
        positive = 0 < self.repetition_penalty < math.inf
        _check_number("repetition_penalty", self.repetition_penalty, positive, "above 0")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value, 0 < value <= 1, "above 0, at most 1")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"top_k={self.top_k!r} must be a whole number from 1, or None")


def _check_number(name, value, valid, range_text):
    if not valid:
        raise ValueError(f"{name}={value!r} must be a number {range_text}")


class Knobs(NamedTuple):
    """`Sampling` as arrays, so that other values compile nothing."""

    repetition_penalty: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    valid_utf8: jax.Array


def knobs(sampling: Sampling) -> Knobs:
    return Knobs(
        jnp.float32(sampling.repetition_penalty),
        jnp.float32(sampling.temperature),
        jnp.int32(sampling.top_k or VOCAB_SIZE),
        # Sums of probabilities may round to 1 and more before the last.
        jnp.float32(math.inf if sampling.top_p in (None, 1) else sampling.top_p),
        jnp.float32(sampling.min_p or 0.0),
        jnp.bool_(sampling.valid_utf8),
    )


def distribution(logits: jax.Array, knobs: Knobs, seen: jax.Array, allowed: jax.Array) -> jax.Array:
    """Log-probabilities of the next id from logits float32 [..., V].

    seen: bool [..., V], ids that occurred. allowed: bool [..., V]. Only bytes and EOS can be drawn:
    the other special ids have no bytes to show.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    drawable = is_drawable(ids)
    penalty = knobs.repetition_penalty
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen & (ids >= BYTE_OFFSET), penalised, logits)
    logits = jnp.where(drawable & allowed, logits, -jnp.inf)
    return jax.lax.cond(knobs.temperature > 0, _tempered, _greedy, logits, knobs)


def _greedy(logits, _):
    best = jnp.argmax(logits, axis=-1)
    return jnp.where(jax.nn.one_hot(best, logits.shape[-1], dtype=bool), 0.0, -jnp.inf)


def _tempered(logits, knobs):
    log_p = jax.nn.log_softmax(logits / jnp.maximum(knobs.temperature, 1e-30))
    filtering = (knobs.top_k < VOCAB_SIZE) | (knobs.top_p < 1) | (knobs.min_p > 0)
    return jax.lax.cond(filtering, _filtered, lambda log_p, _: log_p, log_p, knobs)


def _filtered(log_p, knobs):
    """Each step takes what the one before left, whole again; of equals at a limit all are kept."""
    top = -jnp.sort(-log_p, axis=-1)
    least = jax.lax.dynamic_index_in_dim(top, jnp.minimum(knobs.top_k, top.shape[-1]) - 1, axis=-1)
    log_p = jax.nn.log_softmax(jnp.where(log_p >= least, log_p, -jnp.inf))
    top = -jnp.sort(-log_p, axis=-1)
    p = jnp.exp(top)
    before = jnp.cumsum(p, axis=-1) - p
    least = jnp.min(jnp.where(before < knobs.top_p, top, jnp.inf), axis=-1, keepdims=True)
    log_p = jax.nn.log_softmax(jnp.where(log_p >= least, log_p, -jnp.inf))
    least = log_p.max(axis=-1, keepdims=True) + jnp.log(knobs.min_p)
    return jax.nn.log_softmax(jnp.where(log_p >= least, log_p, -jnp.inf))


def draw(log_p: jax.Array, keys: jax.Array) -> jax.Array:
    """An id int32 [B] of each distribution [B, V]; keys [B]."""
    return jax.vmap(jax.random.categorical)(keys, log_p).astype(jnp.int32)


def leftover(target: jax.Array, draft: jax.Array) -> jax.Array:
    """What to draw from where a byte drawn from `draft` was refused, both [..., V].

    A byte x of the draft is taken with probability min(1, target(x) / draft(x)). What then comes
    out is distributed as the target is (Leviathan et al. 2023, Chen et al. 2023).
    """
    rest = jnp.maximum(jnp.exp(target) - jnp.exp(draft), 0)
    total = rest.sum(axis=-1, keepdims=True)
    # Where the two agree but for rounding nothing is refused, and the target serves.
    return jnp.where(total > 0, jnp.log(rest / jnp.where(total > 0, total, 1)), target)


def row_keys(seeds: jax.Array, *numbers) -> jax.Array:
    """A key for each row from its seed uint32 [B] and numbers [B], whatever the batch."""

    def key(seed, *numbers):
        key = jax.random.key(seed)
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(key)(seeds, *numbers)
