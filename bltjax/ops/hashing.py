"""Rolling polynomial hashes of n-grams, exact to 64 bits without 64-bit integers.

The published hash of an n-gram w is `sum_i w_i * p^i` (i = 0 is the oldest id) in wrapping int64,
then floor-mod V. Accelerators have no fast int64 and JAX disables it by default, so the sum is kept
as four 16-bit limbs in uint32. See model.md#n-grams.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# One prime per hash function, in the published order.
PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)
MAX_NGRAM = 16
MAX_VOCAB = 1 << 28
ID_BITS = 12  # of an id that are hashed at once
MAX_IDS = 1 << 2 * ID_BITS


def ngram_hash_ids(
    tokens: Array,
    sizes: Sequence[int],
    num_functions: int,
    vocab: int,
    num_ids: int = 1 << ID_BITS,
) -> Array:
    """Returns the hash table row of every n-gram, one column per (function, size).

    tokens: integers [..., L] in [0, num_ids); the n-gram at t is tokens[t-n+1..t], with zeros
    before position 0. Result: int32 [..., L, F*N] in [0, vocab), functions in the outer loop and
    sizes in the inner one. Raises ValueError for more functions than primes, or a size, vocab or
    num_ids off range.
    """
    _check(sizes, num_functions, vocab, num_ids)
    tokens = tokens.astype(jnp.uint32)
    if num_ids <= 1 << ID_BITS:
        digits = _hash_digits(tokens, _power_limbs(sizes, num_functions))
    else:  # id = low + 2^12 high, and so are the hashes
        low, high = tokens & (1 << ID_BITS) - 1, tokens >> ID_BITS
        parts = (
            _hash_digits(low, _power_limbs(sizes, num_functions)),
            _hash_digits(high, _power_limbs(sizes, num_functions, 1 << ID_BITS)),
        )
        digits = _carry([a + b for a, b in zip(*parts, strict=True)])
    return _floor_mod(digits, vocab).astype(jnp.int32)


def _hash_digits(tokens: Array, powers: np.ndarray) -> list[Array]:
    """Returns the hashes of uint32 tokens [..., L] below 2^12 as digits, see `_carry`."""
    num_limbs, width, columns = powers.shape
    powers = powers.reshape(num_limbs, width, *[1] * tokens.ndim, columns)
    views = _shifted_views(tokens, width)
    # A sum stays below 16 * 2^12 * 2^16 = 2^32. Its few terms are added one by one, not contracted:
    # then everything from here to the result is elementwise, and XLA makes it one loop.
    limbs = [sum(view * power for view, power in zip(views, limb, strict=True)) for limb in powers]
    return _carry(limbs)


def _check(sizes: Sequence[int], num_functions: int, vocab: int, num_ids: int) -> None:
    if not 1 <= num_functions <= len(PRIMES):
        raise ValueError(f"num_functions is {num_functions}; there are primes for 1..{len(PRIMES)}")
    if not sizes or min(sizes) < 1 or max(sizes) > MAX_NGRAM:
        raise ValueError(f"n-gram sizes are {tuple(sizes)}; give one or more in 1..{MAX_NGRAM}")
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"hash vocab is {vocab}; it must lie in 1..{MAX_VOCAB}")
    if not 1 <= num_ids <= MAX_IDS:
        raise ValueError(f"num_ids is {num_ids}; n-grams are hashed of 1..{MAX_IDS} ids")


def _power_limbs(sizes: Sequence[int], num_functions: int, times: int = 1) -> np.ndarray:
    """Returns uint32 [4, W, F*N]: the limbs, lowest first, of the factor of the id W-1-w back.

    times: a number that all factors are multiplied by.
    """
    width = max(sizes)
    limbs = np.zeros((4, width, num_functions, len(sizes)), np.uint32)
    for f, prime in enumerate(PRIMES[:num_functions]):
        for s, size in enumerate(sizes):
            for i in range(size):
                power = pow(prime, i, 1 << 64) * times % (1 << 64)
                limbs[:, width - size + i, f, s] = [power >> 16 * k & 0xFFFF for k in range(4)]
    return limbs.reshape(4, width, -1)


def _shifted_views(tokens: Array, width: int) -> list[Array]:
    """Returns `width` arrays [..., L, 1], oldest first; the last one is `tokens` itself."""
    length = tokens.shape[-1]
    padded = jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(width - 1, 0)])
    return [padded[..., i : i + length, None] for i in range(width)]


def _carry(sums: list[Array]) -> list[Array]:
    """Returns sums as digits base 2^16, lowest first; what passes 64 bits is dropped."""
    digits, carry = [], 0
    for limb in sums:
        limb = limb + carry
        digits.append(limb & 0xFFFF)
        carry = limb >> 16
    return digits


def _floor_mod(limbs: list[Array], vocab: int) -> Array:
    """Returns the signed 64-bit value of `limbs` modulo vocab, in [0, vocab), by Horner's rule."""
    bits = 16 if vocab <= 1 << 16 else 8 if vocab <= 1 << 24 else 4  # vocab << bits fits 32 bits
    remainder = jnp.zeros_like(limbs[-1])
    for limb in reversed(limbs):
        for shift in range(16 - bits, -1, -bits):
            digit = limb >> shift & (1 << bits) - 1
            remainder = ((remainder << bits) + digit) % vocab
    negative = limbs[-1] >> 15 == 1
    return jnp.where(negative, (remainder + (-(1 << 64)) % vocab) % vocab, remainder)
