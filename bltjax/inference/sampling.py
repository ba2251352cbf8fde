"""Sampling: from logits to the distribution of the next id, and the draw.

A distribution is float32 log-probabilities [..., V], -inf for ids that cannot be drawn. Greedy is
the distribution with all its mass on one id, so drawing and verifying drafts have no modes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.vocabulary import BYTE_OFFSET, is_drawable

ALL = 2**30  # more ids than any vocabulary has


@dataclass(frozen=True)
class Sampling:
    """Options of sampling, in the order of their steps; the defaults are greedy."""

    repetition_penalty: float = 1.0  # logits of ids that occurred, in the prompt too: /p or *p
    temperature: float = 0.0  # 0: the most probable id, always
    top_k: int | None = None  # the k most probable
    top_p: float | None = None  # the most probable that together have this probability
    min_p: float | None = None  # those at least this share of the most probable
    valid_utf8: bool = False  # text is UTF-8, without half a character at its end

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


class SamplingArrays(NamedTuple):
    """`Sampling` as arrays, so that other values compile nothing."""

    repetition_penalty: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    valid_utf8: jax.Array


def sampling_arrays(sampling: Sampling) -> SamplingArrays:
    """Returns the options as arrays."""
    return SamplingArrays(
        jnp.float32(sampling.repetition_penalty),
        jnp.float32(sampling.temperature),
        jnp.int32(sampling.top_k or ALL),
        # Sums of probabilities may round to 1 and more before the last.
        jnp.float32(math.inf if sampling.top_p in (None, 1) else sampling.top_p),
        jnp.float32(sampling.min_p or 0.0),
        jnp.bool_(sampling.valid_utf8),
    )


def distribution(
    logits: jax.Array, sampling: SamplingArrays, seen: jax.Array, allowed: jax.Array
) -> jax.Array:
    """Returns log-probabilities of the next id from logits float32 [..., V] of all V ids.

    seen: bool [..., V], ids that occurred. allowed: bool [..., V]. Of special ids only EOS can be
    drawn: the others have no bytes to show.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    penalty = sampling.repetition_penalty
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen & (ids >= BYTE_OFFSET), penalised, logits)
    logits = jnp.where(is_drawable(ids, logits.shape[-1]) & allowed, logits, -jnp.inf)
    return jax.lax.cond(sampling.temperature > 0, _tempered, _greedy, logits, sampling)


def _greedy(logits, _):
    best = jnp.argmax(logits, axis=-1)
    return jnp.where(jax.nn.one_hot(best, logits.shape[-1], dtype=bool), 0.0, -jnp.inf)


def _tempered(logits, sampling):
    log_p = jax.nn.log_softmax(logits / jnp.maximum(sampling.temperature, 1e-30))
    filtering = (sampling.top_k < log_p.shape[-1]) | (sampling.top_p < 1) | (sampling.min_p > 0)
    return jax.lax.cond(filtering, _filtered, lambda log_p, _: log_p, log_p, sampling)


def _filtered(log_p, sampling):
    """Applies top_k, top_p and min_p, each to the normalised result of the one before.

    Of equals at a limit all are kept.
    """
    top = -jnp.sort(-log_p, axis=-1)
    least = jax.lax.dynamic_index_in_dim(
        top, jnp.minimum(sampling.top_k, top.shape[-1]) - 1, axis=-1
    )
    log_p = jax.nn.log_softmax(jnp.where(log_p >= least, log_p, -jnp.inf))
    top = -jnp.sort(-log_p, axis=-1)
    p = jnp.exp(top)
    before = jnp.cumsum(p, axis=-1) - p
    least = jnp.min(jnp.where(before < sampling.top_p, top, jnp.inf), axis=-1, keepdims=True)
    log_p = jax.nn.log_softmax(jnp.where(log_p >= least, log_p, -jnp.inf))
    least = log_p.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p)
    return jax.nn.log_softmax(jnp.where(log_p >= least, log_p, -jnp.inf))


def draw(log_p: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns an id int32 [B] drawn from each distribution [B, V]; keys [B]."""
    return jax.vmap(jax.random.categorical)(keys, log_p).astype(jnp.int32)


def leftover(target: jax.Array, draft: jax.Array) -> jax.Array:
    """Returns the distribution to draw from after a draft from `draft` was refused, both [..., V].

    A draft x is taken with probability min(1, target(x) / draft(x)); the result is then distributed
    as the target is (Leviathan et al. 2023, Chen et al. 2023).
    """
    rest = jnp.maximum(jnp.exp(target) - jnp.exp(draft), 0)
    total = rest.sum(axis=-1, keepdims=True)
    # Where the two agree but for rounding nothing is refused, and the target serves.
    return jnp.where(total > 0, jnp.log(rest / jnp.where(total > 0, total, 1)), target)


def row_keys(seeds: jax.Array, *numbers) -> jax.Array:
    """Returns a key for each row from its seed uint32 [B] and numbers [B] alone."""

    def key(seed, *numbers):
        key = jax.random.key(seed)
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(key)(seeds, *numbers)
