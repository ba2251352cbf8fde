"""Tokens of a teacher: they cover any bytes exactly, and are those of its own tokenizer."""

import functools
import json
import pickle

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from bltjax.data import tokenizer
from bltjax.data.teacher_tokens import TeacherTokenizer
from bltjax.vocabulary import encode

tokenizers = pytest.importorskip("tokenizers", reason="the extra tokens")
TEXTS = [
    b"the patch, the patch and the byte: 12 na\xc3\xafve words\n" * 3,
    b"x = 1;\n  y = x\n" * 3,
]


def content(**changes) -> dict:
    """A tokenizer.json of byte-level BPE, ids from 0: 256 bytes, then merges."""
    found = json.loads(tokenizer.train(TEXTS, 300).text)
    vocab = sorted(found["model"]["vocab"].items(), key=lambda item: item[1])[4:]
    found["model"]["vocab"] = {token: i for i, (token, _) in enumerate(vocab)}
    return found | changes


@pytest.fixture(scope="module")
def plain() -> TeacherTokenizer:
    return TeacherTokenizer(json.dumps(content()))


PARTS = st.one_of(
    st.binary(max_size=6),
    st.text(max_size=6).map(str.encode),
    st.sampled_from([b"the ", b" patch", b"na\xc3\xafve", b"<|end|>", b" ", b"\n\n", b"\xf1\xff"]),
)


@hypothesis.given(st.lists(PARTS, max_size=8).map(b"".join), st.booleans())
def test_tokens_cover_any_bytes_exactly(plain, data, lacking):
    if lacking:
        plain = without_bytes()
    ids, lengths = plain.encode(data)
    assert lengths.sum() == len(data) and (lengths > 0).all()
    marks = plain.token_ends(data)
    assert len(marks) == len(encode(data))
    ends = np.flatnonzero(marks)
    np.testing.assert_array_equal(marks[ends] - 1, ids)
    np.testing.assert_array_equal(np.diff(ends, prepend=0), lengths)
    pieces = {i: bytes(tokenizer.byte_characters()[c] for c in t) for t, i in vocab(plain).items()}
    begin = 0
    for token, length in zip(ids.tolist(), lengths.tolist(), strict=True):
        part = data[begin : begin + length]
        assert pieces.get(token) == part or (lacking and (token, length) == (0, 1))
        begin += length


def vocab(made: TeacherTokenizer) -> dict:
    return json.loads(made.text)["model"]["vocab"]


@functools.cache
def without_bytes() -> TeacherTokenizer:
    """One without tokens for 0x00 and 0xF1, as SmolLM2's has none for some."""
    found = content()
    characters = {byte: c for c, byte in tokenizer.byte_characters().items()}
    for byte in (0x00, 0xF1):
        del found["model"]["vocab"][characters[byte]]
    return TeacherTokenizer(json.dumps(found))


def test_tokens_are_those_of_the_library(plain):
    text = "the patch and naïve bytes: 日本 12\n"
    found = tokenizers.Tokenizer.from_str(plain.text).encode(text, add_special_tokens=False)
    np.testing.assert_array_equal(plain.encode(text.encode())[0], found.ids)


def test_special_tokens_begin_texts_and_are_not_looked_for_in_them():
    special = dict(
        id=300, content="<|end|>", single_word=False, lstrip=False, rstrip=False,
        normalized=False, special=True,
    )  # fmt: skip
    begins = [
        dict(SpecialToken=dict(id="<|end|>", type_id=0)),
        dict(Sequence=dict(id="A", type_id=0)),
    ]
    processor = dict(
        type="TemplateProcessing",
        single=begins,
        pair=[*begins, dict(Sequence=dict(id="B", type_id=0))],
        special_tokens={"<|end|>": dict(id="<|end|>", ids=[300], tokens=["<|end|>"])},
    )
    unused = special | dict(id=301, content="<|pad|>")  # a model may have no row for it
    changes = dict(
        added_tokens=[special, unused], post_processor=processor, normalizer=dict(type="NFC")
    )
    made = TeacherTokenizer(json.dumps(content(**changes)))
    assert made.bos == 300 and made.num_ids == 301
    assert made.token_ends(b"a")[0] == 301
    ids, lengths = made.encode("e\u0301<|end|>".encode())
    assert 300 not in ids and lengths.sum() == 10
    assert TeacherTokenizer(json.dumps(content())).bos is None


def test_it_can_be_pickled_and_compared(plain):
    again = pickle.loads(pickle.dumps(plain))
    assert again == plain and hash(again) == hash(plain)
    assert again != without_bytes()


@pytest.mark.parametrize(
    "text, said",
    [
        ("no", "no tokenizer.json of the library tokenizers"),
        (json.dumps(dict(model=dict(type="WordPiece", vocab={}))), "kind 'WordPiece'"),
        (json.dumps(dict(model=dict(type="BPE", vocab={"a": 0}))), "give one of byte-level BPE"),
    ],
)
def test_other_kinds_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        TeacherTokenizer(text)
