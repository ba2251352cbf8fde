"""Multiple choice by hand, and items made of a corpus."""

import math

import pytest

from bltjax.evaluation.multiple_choice import Choice, accuracy, items_from_documents
from tests.evaluation.fakes import CaseModel


def test_accuracy_by_hand():
    items = [
        # Without a prompt a choice costs two nats a byte.
        Choice("ab", ("zz", "aabb"), 1),  # 4 nats, 0: right in all ways
        Choice("ab", ("z", "azzaaa"), 1),  # 2 nats, 4; a byte 2, 2/3; less than alone by 0, 8
        Choice("ab", ("zz", "z", ""), 0),  # 4, 2, 0: wrong; less by 0, 0, 0: the first is taken
        Choice("ab", ("aaZZ", "b"), 1),  # 6, 0: right; less by 4, 2: wrong
    ]
    found = accuracy(CaseModel(), items)
    assert found["accuracy"] == 2 / 4
    assert found["accuracy_per_byte"] == 3 / 4 and found["accuracy_mutual"] == 3 / 4
    assert found["bits_per_byte"] == pytest.approx((0 + 4 + 4 + 0) / math.log(2) / (4 + 6 + 2 + 1))
    assert found["chance"] == pytest.approx((3 / 2 + 1 / 3) / 4) and found["items"] == 4


def test_what_is_no_item_is_refused():
    with pytest.raises(ValueError, match="there are no items"):
        accuracy(CaseModel(), [])
    with pytest.raises(ValueError, match=r"items\[0\] has answer=2 and 2 choices"):
        accuracy(CaseModel(), [Choice("a", ("b", "c"), 2)])


def corpus():
    english = " ".join(f"word{i} runs {i * i}" for i in range(800)).encode()
    japanese = "".join(chr(0x3042 + i * 7 % 80) for i in range(4000)).encode()
    return [english, japanese, b"", b"short", bytes(range(128, 256)) * 20]


def test_items_of_a_corpus_are_passages_of_it():
    documents = corpus()
    items = items_from_documents(documents, 40, num_choices=3, seed=2)
    assert len({item.prompt for item in items}) == 40
    for item in items:
        right = item.prompt + item.choices[item.answer]
        assert any(right in document for document in documents)
        assert len(set(item.choices)) == 3
        assert not any(
            item.prompt + c in d for c in item.choices for d in documents if c not in right
        )
        assert 130 <= len(item.prompt) <= 190 and all(20 <= len(c) <= 75 for c in item.choices)
    assert {item.answer for item in items} == {0, 1, 2}
    of_english = [item for item in items if item.prompt in documents[0]]
    of_japanese = [item for item in items if item.prompt in documents[1]]
    assert of_english and all(i.choices[i.answer].startswith(b" ") for i in of_english)
    # Between characters.
    assert of_japanese and all(
        i.prompt.decode() and i.choices[i.answer].decode() for i in of_japanese
    )


def test_items_follow_from_documents_and_seed():
    items = items_from_documents(corpus(), 10, seed=2)
    assert items == items_from_documents(corpus(), 10, seed=2)
    assert items != items_from_documents(corpus(), 10, seed=3)
    texts = items_from_documents([corpus()[1].decode()], 5)
    assert texts == items_from_documents([corpus()[1]], 5)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"have 1 passages of 160 \+ 48 bytes, and 1 items of 4"):
        items_from_documents([b"so few words " * 25], 1)
