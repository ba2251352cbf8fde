"""Sampling: from logits to the distribution of the next id, and the draw.

A distribution is float32 log-probabilities [..., V], -inf for ids that cannot be drawn. Greedy is
the distribution with all its mass on one id, so drawing and verifying drafts have no modes.
"""

import math
from collections.abc import Sequence
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
    """`Sampling` of each row as arrays [B], so that other values compile nothing.

    None: a step that no row needs. Which steps there are is compiled: a GPU waits for the host at
    each branch that a program takes or does not. What a row draws is the same to the bit with the
    steps that only others need. Probabilities are in the form that float32 holds exactly enough:
    what top_p leaves out, and the logarithm of min_p.
    """

    repetition_penalty: np.ndarray | jax.Array | None  # 1: none
    temperature: np.ndarray | jax.Array | None  # 0: greedy
    top_k: np.ndarray | jax.Array | None  # ALL: all. All three of the filters or none
    tail: np.ndarray | jax.Array | None  # 1 - top_p; -1 for all ids
    log_min_p: np.ndarray | jax.Array | None  # -inf for all ids
    valid_utf8: np.ndarray | jax.Array | None  # bool


def sampling_arrays(rows: Sequence[Sampling]) -> SamplingArrays:
    """Returns the options of B rows as arrays."""
    penalty = np.float32([row.repetition_penalty for row in rows])
    temperature = np.float32([_temperature(row) for row in rows])
    top_k = np.int32([min(row.top_k or ALL, ALL) for row in rows])
    tail = np.float32([-1 if row.top_p in (None, 1) else 1 - row.top_p for row in rows])
    log_min_p = np.float32(
        [-math.inf if row.min_p is None else math.log(row.min_p) for row in rows]
    )
    valid_utf8 = np.array([row.valid_utf8 for row in rows])
    filtered = (temperature > 0) & ((top_k < ALL) | (tail >= 0) | (log_min_p > -math.inf))
    filters = [x if filtered.any() else None for x in (top_k, tail, log_min_p)]
    return SamplingArrays(
        penalty if (penalty != 1).any() else None,
        temperature if temperature.any() else None,
        *filters,
        valid_utf8 if valid_utf8.any() else None,
    )


def _temperature(sampling: Sampling) -> float:
    """Returns 0 for greedy sampling, else what float32 holds."""
    greedy = sampling.temperature < GREEDY_BELOW
    return 0.0 if greedy else min(sampling.temperature, LARGEST)


def distribution(
    logits: jax.Array, sampling: SamplingArrays, seen: jax.Array, allowed: jax.Array
) -> jax.Array:
    """Returns log-probabilities of the next id from logits float32 [B, ..., V] of all V ids.

    seen: bool [B, ..., V], ids that occurred. allowed: bool [B, ..., V]. Of special ids only EOS
    can be drawn: the others have no bytes to show. Infinite logits count as the largest numbers,
    NaN as the least. Where nothing is allowed, EOS is.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    per_row = (-1, *[1] * (logits.ndim - 1))
    sampling = jax.tree.map(lambda option: jnp.asarray(option).reshape(per_row), sampling)
    if (penalty := sampling.repetition_penalty) is not None:
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen & (ids >= BYTE_OFFSET), penalised, logits)
    logits = jnp.nan_to_num(logits, nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST)
    can_be_drawn = is_drawable(ids, logits.shape[-1]) & allowed
    can_be_drawn |= (ids == EOS_ID) & ~can_be_drawn.any(axis=-1, keepdims=True)
    logits = jnp.where(can_be_drawn, logits, -jnp.inf)
    if sampling.temperature is None:
        return _greedy(logits)
    return jnp.where(sampling.temperature == 0, _greedy(logits), _tempered(logits, sampling))


def _greedy(logits):
    best = jnp.argmax(logits, axis=-1)
    return jnp.where(
        jax.nn.one_hot(best, logits.shape[-1], dtype=bool), 0, jnp.full_like(logits, -jnp.inf)
    )


def _tempered(logits, sampling):
    # Differences to the largest are 0 or less, and stay finite until those that cannot be drawn
    # are out: -inf times the reciprocal of a large temperature would be NaN.
    below = jnp.maximum(logits - logits.max(axis=-1, keepdims=True), -LARGEST)
    temperature = jnp.where(sampling.temperature == 0, 1, sampling.temperature)
    scaled = jnp.where(logits == -jnp.inf, -jnp.inf, below / temperature)
    log_p = jax.nn.log_softmax(scaled)
    if sampling.top_k is None:
        return log_p
    filtered = (sampling.top_k < ALL) | (sampling.tail >= 0) | (sampling.log_min_p > -jnp.inf)
    return jnp.where(filtered, _filtered(log_p, sampling), log_p)


def _filtered(log_p, sampling):
    """Applies top_k, top_p and min_p, each to the normalised result of the one before.

    Of equals at a limit all are kept, and the most probable id always is.
    """
    ascending, num_ids = jnp.sort(log_p, axis=-1), log_p.shape[-1]
    kth = num_ids - jnp.minimum(sampling.top_k, num_ids)
    kth = jnp.broadcast_to(kth, (*ascending.shape[:-1], 1))
    log_p = _at_least(log_p, jnp.take_along_axis(ascending, kth, axis=-1))
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
