"""Text for a terminal and numbers for JSON."""

import math


def json_number(x: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(x) else x


def printable(text: bytes | str) -> str:
    r"""UTF-8 with everything else as \xNN, control characters (which steer terminals) included."""
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogateescape")  # the bytes of a file name
    decoded = text.decode("utf-8", "backslashreplace")
    return "".join(
        c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else f"\\x{ord(c):02x}"
        for c in decoded
    )
