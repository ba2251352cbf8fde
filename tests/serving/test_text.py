"""Text on the wire is valid UTF-8, and its pieces add up."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax.serving.text import ByteText, name_of_byte, name_of_id
from bltjax.vocabulary import BYTE_OFFSET, EOS_ID

# Whole characters, halves of them, and bytes that are part of none.
PARTS = [
    "a",
    "é",
    "ខ្មែរ",
    "👩‍👩‍👧",
    "日本",
    b"\xff",
    b"\xe2\x82",
    b"\xf0\x9f",
    b"\x80",
    b"\xed\xa0\x80",
]
TEXTS = st.lists(st.sampled_from(PARTS)).map(
    lambda parts: b"".join(p if isinstance(p, bytes) else p.encode() for p in parts)
)


def pieces_of(data, cuts):
    """Consecutive pieces of the given lengths, and the rest."""
    for length in cuts:
        yield data[:length]
        data = data[length:]
    yield data


@given(st.one_of(TEXTS, st.binary()), st.lists(st.integers(0, 5)))
def test_pieces_add_up_to_the_whole_and_each_is_whole(data, cuts):
    text, shown = ByteText(), []
    for piece in pieces_of(data, cuts):
        shown.append(text.add(piece)[0])
        shown[-1].encode()  # no lone surrogate
    shown.append(text.add(b"", final=True)[0])
    whole = data.decode("utf-8", "replace")
    assert "".join(shown) == whole and text.num_characters == len(whole)


@pytest.mark.parametrize("word", ["👋🏽", "ខ្មែរ", "naïve"])
def test_bytes_one_at_a_time_show_only_whole_characters(word):
    text = ByteText()
    shown = [text.add(bytes([byte]))[0] for byte in word.encode()]
    assert [s for s in shown if s] == list(word) and "\ufffd" not in "".join(shown)


def test_half_a_character_is_held_back_and_replaced_at_the_end():
    text = ByteText()
    assert text.add("a👋".encode()[:-1])[0] == "a"
    assert text.add(b"", final=True)[0] == "\ufffd"


@given(st.one_of(TEXTS, st.binary()), st.lists(st.integers(0, 5)))
def test_offsets_point_at_the_character_of_each_byte(data, cuts):
    text, offsets = ByteText(), []
    for piece in pieces_of(data, cuts):
        offsets += text.add(piece)[1]
    whole = data.decode("utf-8", "replace")
    assert len(offsets) == len(data) and offsets == sorted(offsets)
    for at, offset in enumerate(offsets):
        assert whole[offset] == "\ufffd" or bytes([data[at]]) in whole[offset].encode()
    assert {i for i, c in enumerate(whole) if c != "\ufffd"} <= set(offsets)


def test_names_of_bytes_are_unique_and_printable():
    names = [name_of_byte(byte) for byte in range(256)]
    assert len({*names, name_of_id(EOS_ID)}) == 257
    assert all(json.dumps(name, ensure_ascii=True).isprintable() for name in names)
    assert (names[0x41], names[0x0A], names[0xFF]) == ("A", "\\x0a", "\\xff")
    assert name_of_id(0x41 + BYTE_OFFSET) == "A"
