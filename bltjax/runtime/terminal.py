"""Formats text and tables for a terminal, and numbers for JSON."""

import codecs
import math
import sys
from collections.abc import Callable, Iterable, Sequence

_LEAST_WIDTH = 13  # of a column of numbers, so that tables below each other line up


def json_number(x: float) -> float | None:
    """Returns None for NaN, which JSON does not have."""
    return None if math.isnan(x) else x


def short(value) -> str:
    """Returns repr(value) for a message, cut in the middle where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return f"<{type(value).__name__} of too many digits>"
    return text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}"


def _escapes() -> dict[int, str]:
    r"""Returns {code point: as it is shown} of what steers a terminal or hides what is there.

    Control characters but newline and tab, line separators, marks that change the direction of
    text, and the deprecated ones of Unicode beside them.
    """
    controls = {*range(0x20), *range(0x7F, 0xA0)} - set(map(ord, "\n\t"))
    separators = (0x2028, 0x2029)
    directions = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x2070))
    shown = {c: f"\\x{c:02x}" for c in controls}
    return shown | {c: f"\\u{c:04x}" for c in (*separators, *directions)}


_ESCAPES = _escapes()


def printable(text: bytes | str) -> str:
    r"""Returns text that does nothing to a terminal but show itself.

    Control characters and bytes that are not UTF-8 are written as \xNN, marks of direction and line
    separators as \uNNNN. Newlines and tabs stay.
    """
    if isinstance(text, str):
        try:
            text = text.encode("utf-8", "surrogateescape")  # the bytes of a file name
        except UnicodeEncodeError:  # surrogates that stand for no bytes
            text = text.encode("utf-8", "surrogatepass")
    return text.decode("utf-8", "backslashreplace").translate(_ESCAPES)


def printable_name(name: bytes | str) -> str:
    """Returns what `printable` does, on one line: for names of files, sources and records."""
    return printable(name).replace("\n", "\\x0a").replace("\t", "\\x09")


def byte_writer(raw: bool = False) -> Callable[[bytes], None]:
    """Returns a function that writes pieces of a text to stdout as they come.

    A terminal shows them as `printable` does, half a character when its other half has come, or
    with b"", which ends the text. Files and pipes get the bytes themselves, and so does a terminal
    if `raw`.
    """
    decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
    as_they_are = raw or not sys.stdout.isatty()

    def write(piece: bytes):
        if as_they_are:
            sys.stdout.flush()
            sys.stdout.buffer.write(piece)
        else:
            sys.stdout.write(decode(piece, final=not piece).translate(_ESCAPES))
        sys.stdout.flush()

    return write


def print_table(columns: Sequence[str], rows: Iterable[Sequence], digits: int = 4):
    """Prints rows below the names of their columns; the first column is aligned to the left.

    Cells are text, integers, floats (shown with `digits` decimals) or None (shown as "-").
    """
    lines = [list(columns), *([_cell(value, digits) for value in row] for row in rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    widths = [max(width + 2, _LEAST_WIDTH) for width in others]
    for name, *cells in lines:
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{name:{first}}{''.join(aligned)}".rstrip())


def _cell(value, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else printable_name(str(value))
