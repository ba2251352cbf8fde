"""The vectorised n-gram model equals the textbook one; xz equals lzma."""

import collections
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.evaluation import ngram_baselines

# Few distinct bytes make repeated contexts; the extremes try the ends of the uint64 keys.
streams = st.lists(st.sampled_from([0, 1, 97, 254, 255]), min_size=1, max_size=60).map(bytes)


def count_continuations(train, max_order):
    """{context: Counter of next bytes} for all contexts of up to max_order bytes."""
    counts = collections.defaultdict(collections.Counter)
    for order in range(max_order + 1):
        for end in range(order, len(train)):
            counts[train[end - order : end]][train[end]] += 1
    return counts


def textbook_probability(counts, context, byte):
    shorter = textbook_probability(counts, context[1:], byte) if context else 1 / 256
    seen = counts.get(context)
    if seen is None:
        return shorter
    return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen))


@given(streams, streams)
def test_equals_the_textbook_model(train, validation):
    orders = range(8)
    counts = count_continuations(train, max(orders))
    computed = list(ngram_baselines.witten_bell_probabilities(train, validation))
    by_order = ngram_baselines.witten_bell_bits_per_byte(train, validation, orders)
    for order, probabilities in zip(orders, computed, strict=True):
        expected = [
            textbook_probability(counts, validation[max(0, end - order) : end], validation[end])
            for end in range(len(validation))
        ]
        np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
        bits = -sum(map(math.log2, expected)) / len(expected)
        assert by_order[order] == pytest.approx(bits, rel=1e-12)


@settings(max_examples=20)  # Each runs the model 256 times.
@given(streams, streams)
def test_probabilities_of_all_next_bytes_sum_to_one(train, context):
    totals = np.zeros(ngram_baselines.MAX_ORDER + 1)
    for byte in range(256):
        stream = context + bytes([byte])
        totals += [p[-1] for p in ngram_baselines.witten_bell_probabilities(train, stream)]
    np.testing.assert_allclose(totals, 1.0, rtol=1e-12)


def test_random_bytes_cost_eight_bits():
    rng = np.random.default_rng(0)
    train, validation = rng.bytes(200_000), rng.bytes(20_000)
    bits = ngram_baselines.witten_bell_bits_per_byte(train, validation, [1, 0])
    assert list(bits) == [1, 0]
    assert bits[0] == pytest.approx(8.0, abs=0.01)
    assert 8.0 < bits[1] < 8.5  # Chance repetitions mislead a longer context.
    xz = ngram_baselines.baselines([train], [validation])["xz"]
    assert xz == pytest.approx(8.0, abs=0.05)


def test_xz_is_lzma():
    data = Path(lzma.__file__).read_bytes()  # Text on which presets differ.
    xz = ngram_baselines.baselines([b"a"], [data])["xz"]
    assert xz == 8 * len(lzma.compress(data, preset=9)) / len(data)


def test_baselines_join_the_documents():
    train, validation = [b"abra", b"cadabra"], [b"abr", b"", b"acad"]
    results = ngram_baselines.baselines(train, validation)
    assert list(results) == ["order_0", "order_2", "order_3", "order_5", "xz"]
    bits = ngram_baselines.witten_bell_bits_per_byte(b"abracadabra", b"abracad", [5])
    assert results["order_5"] == bits[5]
    assert results["xz"] == 8 * len(lzma.compress(b"abracad", preset=9)) / 7


@pytest.mark.parametrize(
    "train, validation, name", [([b""], [b"a"], "train"), ([b"a"], [], "validation")]
)
def test_an_empty_side_is_refused(train, validation, name):
    with pytest.raises(ValueError, match=f"{name} has no bytes"):
        ngram_baselines.baselines(train, validation)


@pytest.mark.parametrize("orders", [[], [-1], [2, 8]])
def test_impossible_orders_are_refused(orders):
    with pytest.raises(ValueError, match=r"orders=\["):
        ngram_baselines.witten_bell_bits_per_byte(b"a", b"a", orders)
