"""Byte ids against the published tokenizer's cases, and exact round trips."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax import vocabulary

GOLDEN = pathlib.Path(__file__).parent / "golden_data" / "golden"
CASES = json.loads((GOLDEN / "meta_tokenizer_hash_patch_cases.json").read_text())["tokenizer"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_published_cases(case):
    ids = case.get("ids_with_specials")
    if ids is None:
        ids = vocabulary.encode(case["text"])
        assert ids.dtype == np.int32
        assert ids.tolist() == case["tokens"]
        bare = vocabulary.encode(case["text"], add_bos=False, add_eos=False)
        assert bare.tolist() == case["tokens_nobos_noeos"]
    assert vocabulary.decode(ids).decode("utf-8", errors="ignore") == case["decoded"]


@given(st.binary(max_size=64))
def test_any_bytes_round_trip(text):
    tokens = vocabulary.encode(text)
    assert tokens.size == len(text) + 2
    assert tokens.max(initial=0) < vocabulary.VOCAB_SIZE
    assert vocabulary.decode(tokens) == text
    assert vocabulary.decode(tokens, cut_at_eos=True) == text


def test_lone_surrogates_are_dropped():
    assert vocabulary.decode(vocabulary.encode("a\ud800b")) == b"ab"


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_specials_are_added_on_request(add_bos, add_eos):
    tokens = vocabulary.encode(b"\x00", add_bos, add_eos).tolist()
    assert tokens == [vocabulary.BOS_ID] * add_bos + [4] + [vocabulary.EOS_ID] * add_eos


def test_decode_drops_specials_and_cuts_at_the_first_eos():
    ids = [1, 101, 3, 0, -1, 102, 2, 1, 103, 2]
    assert vocabulary.decode(ids) == b"abc"
    assert vocabulary.decode(ids, cut_at_eos=True) == b"ab"
    assert vocabulary.decode([101, 102], cut_at_eos=True) == b"ab"
    assert vocabulary.decode([]) == b""


def test_decode_names_the_id_past_the_vocabulary():
    assert vocabulary.decode([259]) == b"\xff"
    with pytest.raises(ValueError, match="id 260 "):
        vocabulary.decode([1, 260, 101])
