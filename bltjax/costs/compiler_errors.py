"""Parses the compiler's out-of-memory messages."""

import re
import textwrap

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MEMORY = re.compile(r"\b(hbm|[a-z]?mem|sflag)\b")
_ASKED = re.compile(r"(?:\(|used )([\d.]+)([kmgt]?)\)? (?:exceeds available|of [\d.]+[kmgt]?) hbm")


def exhausted(reason: str) -> str | None:
    """Returns the memory that is too small, such as hbm or vmem; None where none is named."""
    named = _MEMORY.search(reason.lower())
    return named[1] if named and "RESOURCE_EXHAUSTED" in reason else None


def asked_hbm_bytes(reason: str) -> int | None:
    """Returns the bytes of HBM that the program needs, if the message names them."""
    asked = _ASKED.search(reason.lower())
    return int(float(asked[1]) * UNITS[asked[2].upper()]) if asked else None


def failure(reason: str) -> str:
    """Returns one sentence for the user on a failure that is not about HBM."""
    told, memory = textwrap.shorten(reason, 400), exhausted(reason)
    if memory:
        return (
            f"the compiler ran out of {memory}, which is not HBM and the same on any number of "
            f"chips: choose other row sizes or widths of heads ({told})"
        )
    return f"the compiler failed: choose another --topology, mesh or program ({told})"
