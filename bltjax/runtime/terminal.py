"""Formats text and tables for a terminal, and numbers for JSON."""

import math
from collections.abc import Iterable, Sequence

_LEAST_WIDTH = 13  # of a column of numbers, so that tables below each other line up


def json_number(x: float) -> float | None:
    """Returns None for NaN, which JSON does not have."""
    return None if math.isnan(x) else x


def printable(text: bytes | str) -> str:
    r"""Returns text in which control characters, which steer terminals, and bytes that are not
    UTF-8 are written as \xNN."""
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogateescape")  # the bytes of a file name
    decoded = text.decode("utf-8", "backslashreplace")
    return "".join(
        c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else f"\\x{ord(c):02x}"
        for c in decoded
    )


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
    return f"{value:.{digits}f}" if isinstance(value, float) else printable(str(value))
