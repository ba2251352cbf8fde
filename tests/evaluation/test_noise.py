"""Noise: each kind by hand, on any bytes, whatever stands beside it; what a model makes of it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax.evaluation import noise
from bltjax.evaluation.multiple_choice import Choice
from bltjax.evaluation.score import Score
from tests.evaluation.fakes import CaseModel

kinds = pytest.mark.parametrize("kind", noise.KINDS)


class Draws:
    """A generator that draws what it is told."""

    def __init__(self, numbers, copies=()):
        self.numbers, self.copies = np.array(numbers), np.array(copies)

    def random(self, size):
        assert size == len(self.numbers)
        return self.numbers

    def integers(self, low, high, size):
        assert (low, high, size) == (2, 5, len(self.numbers))
        return self.copies


def test_each_kind_by_hand():
    assert noise.antspeak("An ant.", Draws([])) == "A N   A N T ."
    assert noise.upper("straße, é", Draws([])) == "STRASSE, É"
    assert noise.drop("byte", Draws([0.5, 0.09, 0.1, 0.0])) == "bt"
    assert noise.random_case("bYtE", Draws([0.4, 0.6, 0.5, 0.49])) == "BytE"
    assert noise.repeat("byte", Draws([0.19, 0.2, 0.5, 0.0], [4, 4, 4, 2])) == "bbbbytee"


def test_shares_are_those_of_the_paper():
    text, rng = "abcdefghij" * 2000, np.random.default_rng(0)
    assert len(noise.drop(text, rng)) / len(text) == pytest.approx(0.9, abs=0.01)
    case = noise.random_case(text, rng)
    assert sum(c.isupper() for c in case) / len(text) == pytest.approx(0.5, abs=0.02)
    assert case.lower() == text
    # A fifth of the characters stands three times on average.
    assert len(noise.repeat(text, rng)) / len(text) == pytest.approx(1.4, abs=0.02)


@kinds
@given(text=st.one_of(st.binary(max_size=40), st.text(st.characters(), max_size=40)))
def test_any_text_has_noise_of_its_own_type(kind, text):
    found = noise.noisy(text, kind)
    assert type(found) is type(text)
    assert found == noise.noisy(text, kind)
    assert noise.noisy(text[:0], kind) == text[:0]


def test_bytes_that_are_no_characters_stay():
    assert noise.noisy(b"\xff\xc3\xa9\x80", "antspeak") == b"\xff \xc3\x89 \x80"
    assert noise.noisy("é".encode(), "upper") == "É".encode()


@pytest.mark.parametrize("kind", ["drop", "random_case", "repeat"])
def test_noise_follows_from_the_seed_and_the_text_alone(kind):
    documents = ["The quick brown fox jumps over the lazy dog. " * 3, "another text, as long " * 6]
    found = [noise.noisy(document, kind, seed=1) for document in documents]
    assert found[::-1] == [noise.noisy(document, kind, seed=1) for document in documents[::-1]]
    assert found != [noise.noisy(document, kind, seed=2) for document in documents]
    assert found[0] != documents[0]


def test_items_have_noise_where_it_is_asked_for():
    item = Choice("a b", ("c", "d"), 1)
    found = [noise.noisy_items([item], "antspeak", where) for where in noise.WHERE]
    assert found == [
        [Choice("A   B", ("c", "d"), 1)],
        [Choice("a b", ("C", "D"), 1)],
        [Choice("A   B", ("C", "D"), 1)],
    ]


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="noise 'leet' is not known: give one of antspeak, drop"):
        noise.noisy("text", "leet")
    with pytest.raises(ValueError, match="where='choices' must be one of prompt, completion, both"):
        noise.noisy_items([], "drop", "choices")


def test_robustness_of_a_model_that_reads_lower_case_only():
    """Upper-case letters cost it a nat each, and choices that go on in the prompt's word less."""
    items = [Choice("ab", ("zzzz", "abab"), 1), Choice("cd", ("cdcd", "xxxx"), 0)]
    found = noise.robustness(CaseModel(), items, seed=3)
    assert found["clean"]["accuracy"] == found["clean"]["accuracy_per_byte"] == 1.0
    upper = found["noisy"]["upper"]
    assert upper["both"]["accuracy"] == 1.0 and upper["prompt"]["accuracy"] == 0.5
    bits = found["bits_per_byte"]
    assert list(bits) == ["clean", *noise.KINDS] and bits["clean"] == 0.0
    assert bits["upper"] == pytest.approx(1 / math.log(2))
    for name in ("accuracy", "accuracy_per_byte", "accuracy_mutual"):
        accuracies = [a[name] for by in found["noisy"].values() for a in by.values()]
        assert found["mean"][name] == pytest.approx(np.mean(accuracies)) and len(accuracies) == 15
    assert isinstance(CaseModel().score(["a"])[0], Score)
