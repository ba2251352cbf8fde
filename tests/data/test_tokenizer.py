"""Byte-level BPE: any bytes come back, ids are in their places, training has one result."""

import json
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax.data import tokenizer
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, VOCAB_SIZE, encode

TEXTS = [b"the patch, the byte; the latent\n", "naïve 日本 naïve 日本\n\n".encode()] * 3
TEXTS += [b"\xff\xfe the \x00\x00\x00\x00", b"", b"    x = 12345\n    y = 12345\n"] * 2
TRAINED = tokenizer.train(TEXTS, 400)
BYTES_ONLY = tokenizer.train([], VOCAB_SIZE)
# Words with vowel signs, tone marks and joined consonants, which are combining marks.
MARKED = ["हिन्दी", "தமிழ்", "বাংলা", "ภาษาไทยที่นี่", "ភាសាខ្មែរ", "e\u0301te\u0301"]
WITH_MARKS = tokenizer.train([f"{w} {w}".encode() for w in MARKED] * 3, 1000, "marks")


@given(
    st.lists(st.one_of(st.binary(), st.text().map(lambda t: t.encode()), st.sampled_from(TEXTS)))
)
def test_any_bytes_come_back_and_are_counted(parts):
    text = b"".join(parts)
    ids = TRAINED.encode(text)
    assert ids.dtype == np.int32 and (ids[0], ids[-1]) == (BOS_ID, EOS_ID)
    assert (ids[1:-1] >= BYTE_OFFSET).all() and TRAINED.decode(ids) == text
    assert TRAINED.byte_lengths()[ids].sum() == len(text)
    np.testing.assert_array_equal(BYTES_ONLY.encode(text), encode(text))


def test_common_pairs_are_merged():
    ids = TRAINED.encode("the patch, naïve 日本", add_bos=False, add_eos=False)
    assert [TRAINED.decode([i]).decode() for i in ids] == ["the", " patch", ",", " naïve", " 日本"]
    assert 300 < len(TRAINED) < 400  # no more pairs occur twice


def test_text_is_cut_as_by_llama():
    found = TRAINED._library.pre_tokenizer.pre_tokenize_str("It's 12345\n\n  x=(y)  z")
    pieces = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in found]
    assert pieces == ["It", "'s", " ", "123", "45", "\n\n", " ", " x", "=(", "y", ")", " ", " z"]


def pieces(tokens, text):
    """What a tokenizer cuts a text into before it merges."""
    found = tokens._library.pre_tokenizer.pre_tokenize_str(text)
    return [text[slice(*place)] for _, place in found]


@pytest.mark.parametrize("word", MARKED)
def test_marks_cut_words_unless_they_belong_to_them(word):
    text = f"{word} {word}, 12{word}"
    assert pieces(WITH_MARKS, text) == [word, f" {word}", ",", " ", "12", word]
    assert max(map(len, pieces(TRAINED, text))) < len(word)
    ids = WITH_MARKS.encode(text, add_bos=False, add_eos=False)
    assert WITH_MARKS.decode(ids) == text.encode()
    assert [WITH_MARKS.decode([i]).decode() for i in ids[:2]] == [word, f" {word}"]


def test_without_marks_the_patterns_cut_alike():
    text = "It's 12345\n\n  x=(y)  z naïve 日本 !!❤ "
    assert pieces(WITH_MARKS, text) == pieces(TRAINED, text)
    assert pieces(WITH_MARKS, "!!❤\ufe0f x") == ["!!❤\ufe0f", " x"]  # a mark of no letter


def test_a_tokenizer_keeps_its_pattern(tmp_path):
    WITH_MARKS.save(tmp_path / "tokenizer.json")
    loaded = tokenizer.load(tmp_path / "tokenizer.json")
    plain = tokenizer.train([], VOCAB_SIZE, "marks")
    assert loaded.digest == WITH_MARKS.digest and plain.digest != BYTES_ONLY.digest
    assert pieces(loaded, MARKED[0]) == [MARKED[0]]
    with pytest.raises(ValueError, match="pattern='words' must be one of letters, marks"):
        tokenizer.train([], 300, "words")


def test_no_text_names_a_special_id():
    text = "".join(tokenizer.SPECIAL) * 9
    trained = tokenizer.train([text.encode()] * 9, 400)
    ids = trained.encode(text, add_bos=False, add_eos=False)
    assert ids.min() >= BYTE_OFFSET and trained.decode(ids).decode() == text
    np.testing.assert_array_equal(trained.byte_lengths()[:BYTE_OFFSET], 0)


def test_lone_surrogates_are_dropped_as_by_the_byte_vocabulary():
    assert TRAINED.decode(TRAINED.encode("a\ud800b")) == b"ab"


def test_the_order_of_documents_changes_nothing():
    assert tokenizer.train(TEXTS[::-1], 400).text == TRAINED.text


def test_long_texts_are_encoded_in_parts(monkeypatch):
    text = b"".join(TEXTS)
    whole = TRAINED.encode(text)
    monkeypatch.setattr(tokenizer, "PART_CHARACTERS", 7)
    assert TRAINED.decode(TRAINED.encode(text)) == text
    assert len(TRAINED.encode(text)) > len(whole)  # some words are cut


def test_files_and_pickles_hold_all_of_it(tmp_path):
    TRAINED.save(tmp_path / "tokenizer.json")
    loaded = tokenizer.load(tmp_path / "tokenizer.json")
    for other in (loaded, pickle.loads(pickle.dumps(TRAINED))):
        assert other.digest == TRAINED.digest != BYTES_ONLY.digest
        np.testing.assert_array_equal(other.encode(TEXTS[1]), TRAINED.encode(TEXTS[1]))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["model"]["vocab"]["a"] == BYTE_OFFSET + ord("a")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def foreign():
    """A file of the library with ids in another order."""
    content = json.loads(TRAINED.text)
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return json.dumps(content)


@pytest.mark.parametrize("text", ["", "{}", '{"model": 3}', foreign()], ids=range(4))
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*train one"):
        tokenizer.load(tmp_path / "tokenizer.json")


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="vocab_size=259 must be at least 260"):
        tokenizer.train([], 259)
    with pytest.raises(ValueError, match=r"has \d+ ids and the model 300: raise"):
        TRAINED.byte_lengths(300)
    assert TRAINED.byte_lengths(500).shape == (500,)
    for ids in ([-1], [len(TRAINED)]):
        with pytest.raises(ValueError, match=r"the tokenizer has 0\.\."):
            TRAINED.decode(ids)


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'bltjax\[tokens\]'"):
        tokenizer.train([], 300)
