"""Baselines without a neural network, for comparison with a model's bits per byte.

Interpolated Witten-Bell n-gram models are fitted on the training bytes; xz at preset 9 compresses
the validation bytes alone. Either side without bytes raises ValueError. An order-n model sees the n
previous bytes:

    p_n(b | c) = (count(c, b) + T(c) p_{n-1}(b | c')) / (count(c) + T(c))

with T(c) the number of distinct bytes seen after c, c' = c without its oldest byte, p_n = p_{n-1}
for a context never seen, and p_{-1} = 1/256 (Witten and Bell 1991, method C).
"""

import itertools
import lzma
from collections.abc import Iterator, Sequence

import numpy as np

MAX_ORDER = 7  # Context and next byte together are one uint64.
BASELINE_ORDERS = (0, 2, 3, 5)


def baselines(
    train_documents: Sequence[bytes], validation_documents: Sequence[bytes]
) -> dict[str, float]:
    """Returns the bits per byte of order_0, order_2, order_3, order_5 and xz.

    Documents are concatenated, so contexts reach across document ends.
    """
    train, validation = b"".join(train_documents), b"".join(validation_documents)
    by_order = witten_bell_bits_per_byte(train, validation, BASELINE_ORDERS)
    results = {f"order_{order}": bits for order, bits in by_order.items()}
    return results | {"xz": 8 * len(lzma.compress(validation, preset=9)) / len(validation)}


def witten_bell_bits_per_byte(
    train: bytes, validation: bytes, orders: Sequence[int]
) -> dict[int, float]:
    """Returns the mean -log2 p_n of a validation byte for each order n in `orders`.

    Orders are 0 to 7. The first bytes of `validation` have fewer than n bytes before them and use
    all there are. Raises ValueError for no or other orders.
    """
    if not orders or not all(0 <= order <= MAX_ORDER for order in orders):
        raise ValueError(f"orders={list(orders)} must be one or more of 0 to {MAX_ORDER}")
    steps = enumerate(witten_bell_probabilities(train, validation))
    wanted = itertools.islice(steps, max(orders) + 1)
    bits = {order: float(-np.log2(p).mean()) for order, p in wanted if order in orders}
    return {order: bits[order] for order in orders}


def witten_bell_probabilities(train: bytes, validation: bytes) -> Iterator[np.ndarray]:
    """Yields the probability of each validation byte, float64 [N], under orders 0, 1, ..., 7.

    Position i of order n > i has p_i, its longest context. Time and memory are those of sorting
    the training bytes as uint64 once per order.
    """
    for name, data in (("train", train), ("validation", validation)):
        if not data:
            raise ValueError(f"{name} has no bytes: give at least one")
    probabilities = np.full(len(validation), 1.0 / 256)
    for order in range(MAX_ORDER + 1):
        # Sorted queries walk the sorted n-grams in order, which is far kinder to the cache.
        queries = _ngrams(validation, order)
        positions = np.argsort(queries)
        ngrams = np.sort(_ngrams(train, order))
        seen, total, distinct = _counts(ngrams, queries[positions])
        positions += order
        shorter = probabilities[positions]
        interpolated = (seen + distinct * shorter) / np.maximum(total + distinct, 1)
        probabilities = probabilities.copy()
        probabilities[positions] = np.where(total > 0, interpolated, shorter)
        yield probabilities


def _ngrams(data: bytes, order: int) -> np.ndarray:
    """Returns the order + 1 bytes that end at each position, from `order` on, as one uint64."""
    stream = np.frombuffer(data, np.uint8)
    count = max(len(stream) - order, 0)
    ngrams = np.zeros(count, np.uint64)
    for offset in range(order + 1):
        ngrams <<= np.uint64(8)
        ngrams |= stream[offset : offset + count]
    return ngrams


def _counts(ngrams: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns count(c, b), count(c) and T(c) of each query (c, b), among the sorted `ngrams`."""
    last_byte = np.uint64(0xFF)
    lowest, highest = queries & ~last_byte, queries | last_byte
    is_first = np.append(True, ngrams[1:] != ngrams[:-1])[: len(ngrams)]
    return (
        _count_between(ngrams, queries, queries),
        _count_between(ngrams, lowest, highest),
        _count_between(ngrams[is_first], lowest, highest),
    )


def _count_between(ordered: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Counts the entries of `ordered` in [low, high]."""
    after = np.searchsorted(ordered, high, side="right")
    return after - np.searchsorted(ordered, low, side="left")
