"""A source that is told where its tokens end, against sums over its whole vocabulary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.told_ends import ToldEnds

ALPHABET = [bytes([b]) for b in (0, 97, 98, 254, 255)]


def drawn(texts, seed):
    """Pieces of ids in any order, of which id 0 has none, and likelihoods of all ids."""
    rng = np.random.default_rng(seed)
    texts = sorted(texts | set(ALPHABET))
    ids = 1 + rng.permutation(len(texts))
    logits = rng.normal(0, 3, 1 + len(texts))
    return dict(zip(ids.tolist(), texts, strict=True)), logits


def likelihood(pieces, logits, condition) -> float:
    shares = np.exp(logits) / np.exp(logits).sum()
    return sum(shares[number] for number, text in pieces.items() if condition(text))


TEXTS = st.sets(
    st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=4).map(b"".join), max_size=12
)


@given(TEXTS, st.integers(0, 99))
def test_the_cost_of_bytes_and_that_of_ends_are_the_cost_of_a_token(texts, seed):
    pieces, logits = drawn(texts, seed)
    ids = np.array([0, *pieces])
    found = ToldEnds(pieces).nats(np.tile(logits, (len(ids), 1)), ids)
    shares = np.exp(logits) / np.exp(logits).sum()
    assert found[0] == pytest.approx(-np.log(shares[0]))
    for nats, (number, text) in zip(found[1:], pieces.items(), strict=True):
        ends = [  # likelihood that a token ends with a prefix, of those that begin with it
            likelihood(pieces, logits, lambda x, p=text[:k]: x == p)
            / likelihood(pieces, logits, lambda x, p=text[:k]: x.startswith(p))
            for k in range(1, 1 + len(text))
        ]
        of_ends = -np.log(ends[-1]) - np.log1p(-np.array(ends[:-1])).sum()
        assert nats + of_ends == pytest.approx(-np.log(shares[number]), abs=1e-9)
        assert nats <= -np.log(shares[number]) + 1e-9


def test_a_token_alone_with_its_bytes_costs_what_follows_from_its_first_byte():
    pieces = {0: b"a", 1: b"ab", 2: b"b"}
    logits = np.log([[0.5, 0.25, 0.25]])
    found = [float(ToldEnds(pieces).nats(logits, np.array([i]))[0]) for i in range(3)]
    # After "a" that is no token the next byte is certain.
    np.testing.assert_allclose(found, -np.log([0.75, 0.75, 0.25]))
