"""Sampling: from logits to the distribution of the next id, and the draw.

A distribution is float32 log-probabilities [..., V], -inf for ids that cannot be drawn. Greedy is
the distribution with all its mass on one id, so drawing and verifying drafts have no modes.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.runtime.terminal import short
from bltjax.vocabulary import BYTE_OFFSET, EOS_ID, is_drawable

ALL = 2**30  # more ids than any vocabulary has
# Temperatures below it are greedy: float32 logits divided by them tell little but their order, and
# overflow. vLLM draws the line there too.
GREEDY_BELOW = 1e-5
PENALTIES = (1e-6, 1e6)  # products and quotients of logits stay far from the ends of float32
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sampling:
    """Options of sampling, in the order of their steps; the defaults are greedy.

    Raises ValueError for a value out of range. A value in range has the effect that its exact value
    has, also where float32 does not hold it.
    """

    repetition_penalty: float = 1.0  # logits of ids that occurred, in the prompt too: /p or *p
    temperature: float = 0.0  # below GREEDY_BELOW: the most probable id, always
    top_k: int | None = None  # the k most probable
    top_p: float | None = None  # the most probable that together have this probability
    min_p: float | None = None  # those at least this share of the most probable
    valid_utf8: bool = False  # text is UTF-8, without half a character at its end

    def __post_init__(self):
        make_plain(self)
        check_number(
            "temperature",
            self.temperature,
            lambda t: 0 <= t < math.inf,
            "a number 0 or more, and finite",
        )
        least, most = PENALTIES
        check_number(
            "repetition_penalty",
            self.repetition_penalty,
            lambda penalty: least <= penalty <= most,
            f"a number above 0, from {least:g} to {most:g}",
        )
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None:
                check_number(
                    name, value, lambda p: 0 < p <= 1, "a number above 0, at most 1, or None"
                )
        top_k = self.top_k
        if not (top_k is None or (is_whole(top_k) and top_k >= 1)):
            raise ValueError(f"top_k={short(top_k)} must be a whole number from 1, or None")
        if not isinstance(self.valid_utf8, bool):
            raise ValueError(f"valid_utf8={short(self.valid_utf8)} must be True or False")


def make_plain(options):
    """Puts Python's numbers in the place of NumPy's, and of arrays without axes."""
    for field in fields(options):
        object.__setattr__(options, field.name, plain(getattr(options, field.name)))


def plain(value):
    """Returns the number in an array without axes, or the value as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def is_whole(value) -> bool:
    """Returns whether a value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value, is_valid, wanted: str):
    """Raises ValueError for an option that is no number, or for which is_valid(value) is false."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and is_valid(value)):
        raise ValueError(f"{name}={short(value)} must be {wanted}")


class SamplingArrays(NamedTuple):
    """`Sampling` as arrays, so that other values compile nothing. None: a step that is left out.

    Which steps there are is compiled: a GPU waits for the host at each branch that a program takes
    or does not. Probabilities are in the form that float32 holds exactly enough: what top_p leaves
    out, and the logarithm of min_p.
    """

    repetition_penalty: jax.Array | None
    temperature: jax.Array | None  # None: greedy
    top_k: jax.Array | None  # all three of the filters or none
    tail: jax.Array | None  # 1 - top_p; -1 for all ids
    log_min_p: jax.Array | None  # -inf for all ids
    valid_utf8: jax.Array | None  # True


def sampling_arrays(sampling: Sampling) -> SamplingArrays:
    """Returns the options as arrays."""
    top_p, min_p = sampling.top_p, sampling.min_p
    greedy = sampling.temperature < GREEDY_BELOW
    filters = (sampling.top_k, None if top_p == 1 else top_p, min_p) != (None,) * 3 and not greedy
    return SamplingArrays(
        None if sampling.repetition_penalty == 1 else jnp.float32(sampling.repetition_penalty),
        None if greedy else jnp.float32(min(sampling.temperature, LARGEST)),
        jnp.int32(min(sampling.top_k or ALL, ALL)) if filters else None,
        jnp.float32(-1 if top_p is None or top_p == 1 else 1 - top_p) if filters else None,
        jnp.float32(-math.inf if min_p is None else math.log(min_p)) if filters else None,
        jnp.bool_(True) if sampling.valid_utf8 else None,
    )


def distribution(
    logits: jax.Array, sampling: SamplingArrays, seen: jax.Array, allowed: jax.Array
) -> jax.Array:
    """Returns log-probabilities of the next id from logits float32 [..., V] of all V ids.

    seen: bool [..., V], ids that occurred. allowed: bool [..., V]. Of special ids only EOS can be
    drawn: the others have no bytes to show. Infinite logits count as the largest numbers, NaN as
    the least. Where nothing is allowed, EOS is.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    if (penalty := sampling.repetition_penalty) is not None:
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen & (ids >= BYTE_OFFSET), penalised, logits)
    logits = jnp.nan_to_num(logits, nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST)
    can_be_drawn = is_drawable(ids, logits.shape[-1]) & allowed
    can_be_drawn |= (ids == EOS_ID) & ~can_be_drawn.any(axis=-1, keepdims=True)
    logits = jnp.where(can_be_drawn, logits, -jnp.inf)
    return _greedy(logits) if sampling.temperature is None else _tempered(logits, sampling)


def _greedy(logits):
    best = jnp.argmax(logits, axis=-1)
    return jnp.where(
        jax.nn.one_hot(best, logits.shape[-1], dtype=bool), 0, jnp.full_like(logits, -jnp.inf)
    )


def _tempered(logits, sampling):
    # Differences to the largest are 0 or less, and stay finite until those that cannot be drawn
    # are out: -inf times the reciprocal of a large temperature would be NaN.
    below = jnp.maximum(logits - logits.max(axis=-1, keepdims=True), -LARGEST)
    scaled = jnp.where(logits == -jnp.inf, -jnp.inf, below / sampling.temperature)
    log_p = jax.nn.log_softmax(scaled)
    return log_p if sampling.top_k is None else _filtered(log_p, sampling)


def _filtered(log_p, sampling):
    """Applies top_k, top_p and min_p, each to the normalised result of the one before.

    Of equals at a limit all are kept, and the most probable id always is.
    """
    ascending, num_ids = jnp.sort(log_p, axis=-1), log_p.shape[-1]
    kth = num_ids - jnp.minimum(sampling.top_k, num_ids)
    log_p = _at_least(log_p, jax.lax.dynamic_index_in_dim(ascending, kth, axis=-1))
    ascending = jnp.sort(log_p, axis=-1)
    # Sums from the least probable on, where float32 has digits for small tails.
    beyond = jnp.cumsum(jnp.exp(ascending), axis=-1) > sampling.tail
    least = jnp.min(jnp.where(beyond, ascending, jnp.inf), axis=-1, keepdims=True)
    log_p = _at_least(log_p, jnp.minimum(least, ascending[..., -1:]))
    return _at_least(log_p, log_p.max(axis=-1, keepdims=True) + sampling.log_min_p)


def _at_least(log_p, least):
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
