"""Tables and text for terminals."""

import pytest

from bltjax.runtime.terminal import print_table, printable


@pytest.mark.parametrize(
    "text, shown",
    [
        (b"caf\xc3\xa9\n", "café\n"),
        (b"\xc3", "\\xc3"),
        (b"\x00\x7f\xc2\x9b", "\\x00\\x7f\\x9b"),
        ("a\udcff", "a\\xff"),
    ],
)
def test_what_steers_a_terminal_is_not_printed(text, shown):
    assert printable(text) == shown


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
