"""Tables and text for terminals."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax.runtime.terminal import byte_writer, print_table, printable, printable_name


@pytest.mark.parametrize(
    "text, shown",
    [
        (b"caf\xc3\xa9\n", "café\n"),
        (b"\xc3", "\\xc3"),
        (b"\x00\x7f\xc2\x9b", "\\x00\\x7f\\x9b"),
        ("a\udcff", "a\\xff"),
        ("a\ud800", "a\\xed\\xa0\\x80"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("user\u202etxt.exe\u2069", "user\\u202etxt.exe\\u2069"),
        ("one\u2028two\r\n\x85", "one\\u2028two\\x0d\n\\x85"),
        ("\u061c\u200e\u200f\u2066\u206a", "\\u061c\\u200e\\u200f\\u2066\\u206a"),
        ("\N{ZERO WIDTH JOINER}👩‍💻 日本", "\N{ZERO WIDTH JOINER}👩‍💻 日本"),
    ],
)
def test_what_steers_a_terminal_is_not_printed(text, shown):
    assert printable(text) == shown


STEERING = [*range(9), *range(11, 32), *range(127, 160), 0x61C, 0x2028, 0x2029]
STEERING += [0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]


@given(st.text(st.one_of(st.characters(codec=None), st.sampled_from([*map(chr, STEERING)]))))
def test_no_text_steers_a_terminal(text):
    shown = printable(text)
    assert not set(map(ord, shown)) & set(STEERING)
    shown.encode()  # it can be printed
    assert not set(printable_name(text)) & set("\n\t")


class Out(io.TextIOWrapper):
    """A stdout that is a terminal, or is none."""

    def __init__(self, terminal: bool):
        super().__init__(io.BytesIO(), "utf-8", newline="\n")
        self.isatty = lambda: terminal


@given(text=st.binary(max_size=30) | st.text(max_size=20).map(str.encode), data=st.data())
def test_pieces_show_as_the_whole(text, data):
    """Wherever a text is cut; and a pipe, or a terminal that wants it raw, gets the bytes."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for terminal, raw in ((True, False), (False, False), (True, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", Out(terminal))
            write = byte_writer(raw)
            for piece in [*filter(None, pieces), b""]:
                write(piece)
            found = sys.stdout.buffer.getvalue()
        assert found == (printable(text).encode() if terminal and not raw else text)


def test_a_table_is_aligned_and_wide_enough(capsys):
    rows = [("a\x1b[1m", 7, 0.12345, ""), ("b", 10**15, None, "x")]
    print_table(("name", "bytes", "share", "more"), rows, digits=3)
    assert capsys.readouterr().out.splitlines() == [
        "name                 bytes        share         more",
        "a\\x1b[1m                 7        0.123",
        "b         1000000000000000            -            x",
    ]
    print_table(("name", "bytes"), [])
    assert capsys.readouterr().out == "name        bytes\n"
