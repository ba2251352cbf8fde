"""What may follow in valid UTF-8, against Python's decoder."""

import codecs
import itertools
import re

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.inference import utf8
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, VOCAB_SIZE

# The first and last byte of every class of the Unicode table, and their neighbours.
EDGES = bytes.fromhex("007f 808f 909f a0bf c1c2 dfe0 e1ec edee eff0 f1f3 f4f5 ff".replace(" ", ""))
SURROGATE = re.compile(b"\xed[\xa0-\xbf]")  # refused, but by Python's decoder a byte later
state_after, may_follow = jax.jit(utf8.state_after), jax.jit(utf8.may_follow)


def states(texts) -> np.ndarray:
    """The states after texts, bytes of any length."""
    last = np.full((len(texts), utf8.LONGEST), BOS_ID, np.int32)
    for row, text in zip(last, texts, strict=True):
        end = np.frombuffer(text[-utf8.LONGEST :], np.uint8)
        row[len(row) - len(end) :] = end.astype(np.int32) + BYTE_OFFSET
    return np.asarray(state_after(last))


def allowed_bytes(texts, room) -> np.ndarray:
    """bool [N, 256]"""
    room = np.full(len(texts), room, np.int32)
    return np.asarray(may_follow(states(texts), room))[:, BYTE_OFFSET:]


def open_character(text) -> bytes:
    """The bytes of an unfinished character at the end of a text, by Python's decoder."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text)
    held = decoder.getstate()[0]
    return b"" if SURROGATE.match(held) else held


def goes_on(text) -> bool:
    """Whether valid UTF-8 may start so."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(text)
    except UnicodeDecodeError:
        return False
    return not SURROGATE.match(decoder.getstate()[0])


def shortest_end(start) -> int:
    """How many bytes complete a character that starts so."""
    for length in range(utf8.LONGEST):
        for end in itertools.product(b"\x80\x90\xa0", repeat=length):
            try:
                (start + bytes(end)).decode()
            except UnicodeDecodeError:
                continue
            return length
    raise AssertionError(start)


def test_after_every_start_of_a_character():
    """Every byte after any start, and EOS between characters only."""
    starts = [b""] + [bytes([b]) for b in range(256) if goes_on(bytes([b]))]
    starts += [s + bytes([b]) for s in starts for b in EDGES if goes_on(s + bytes([b]))]
    starts += [
        s + bytes([b]) for s in starts if len(s) == 2 for b in EDGES if goes_on(s + bytes([b]))
    ]
    assert max(map(len, starts)) == 3 and len(starts) > 1000
    open_ends = [open_character(s) for s in starts]
    found = np.asarray(may_follow(states(starts), np.full(len(starts), 9, np.int32)))
    expected = np.zeros_like(found)
    for open_end in set(open_ends):
        may = [goes_on(open_end + bytes([b])) for b in range(256)]
        expected[[e == open_end for e in open_ends], BYTE_OFFSET:] = may
    expected[:, EOS_ID] = [e == b"" for e in open_ends]
    np.testing.assert_array_equal(found, expected)
    assert len(found[0]) == VOCAB_SIZE


def test_room_for_the_rest_of_a_character():
    """A character starts only where it fits; one that is open goes on in any case."""
    leads = [bytes([b]) for b in range(256) if goes_on(bytes([b]))]
    for room in range(5):
        found = allowed_bytes([b""], room)[0]
        fits = [1 + shortest_end(lead) <= room for lead in leads]
        np.testing.assert_array_equal(found[[lead[0] for lead in leads]], fits)
        assert allowed_bytes([b"\xf0"], room)[0].nonzero()[0].tolist() == list(range(0x90, 0xC0))
    assert may_follow(np.int32(utf8.START), np.int32(1))[EOS_ID]


@given(st.text(min_size=1, max_size=12))
@settings(max_examples=60)
def test_every_text_can_be_written_in_the_room_it_needs(text):
    data = text.encode("utf-8", errors="ignore")
    prefixes = [data[:i] for i in range(48)]  # of one number, so that one is compiled
    room = np.maximum(len(data) - np.arange(48), 0).astype(np.int32)
    found = np.asarray(may_follow(states(prefixes), room))
    assert found[np.arange(len(data)), np.frombuffer(data, np.uint8) + BYTE_OFFSET].all()


@given(st.binary(max_size=6), st.integers(0, 9), st.data())
@settings(max_examples=80)
def test_whatever_is_drawn_decodes(prompt, room, data):
    """After any prompt: its open character goes on, or a new one starts; none is left half."""
    written = b""
    for left in range(room, 0, -1):
        ids = np.flatnonzero(may_follow(states([prompt + written])[0], np.int32(left)))
        drawn = data.draw(st.sampled_from(ids.tolist()))
        if drawn == EOS_ID:
            break
        written += bytes([drawn - BYTE_OFFSET])
    start = open_character(prompt)
    cut = start and room < shortest_end(start)  # no room from the first
    assert goes_on(start + written) if cut else (start + written).decode() is not None


@given(st.lists(st.sampled_from(EDGES), max_size=8).map(bytes))
@settings(max_examples=200)
def test_states_follow_the_decoder_through_invalid_bytes(text):
    """The state is that of what Python still holds back, and START where it holds nothing."""
    pending = open_character(text)
    assert states([text])[0] == states([pending])[0]
    assert (states([text])[0] == utf8.START) == (pending == b"")
