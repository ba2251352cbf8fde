"""Checks of single settings. Each returns a list of problems, empty where all is well.

Numbers are computed in float32, and arrays are indexed by int32.
"""

import dataclasses

TINY, HUGE = 1e-30, 1e30  # of a float: what lies beyond may become 0 or infinite
MOST = 2**31 - 1  # of an integer
MOST_WIDTH = 2**20  # of vectors, heads and the like
MOST_ROW = 2**30  # bytes, and other lengths within a row
MOST_SEED = 2**32 - 1
MOST_BYTES = 2**63 - 1  # of a corpus
MOST_WORKERS = 4096  # processes on a machine
SHOWN = 80  # letters of a value in a message


def positive(config, name: str, *names: str, most: int = MOST) -> list[str]:
    """Returns the problems of settings that must be above 0; by default of all numbers.

    most: the largest integer.
    """
    wanted = f"positive, at most {most}", f"positive, from {TINY} to {HUGE}"
    return _problems(config, name, names, wanted, lambda x: 1 <= x <= most, _is_usual)


def not_negative(config, name: str, *names: str, most: int = MOST) -> list[str]:
    """Returns the problems of settings that must be finite numbers, 0 or more."""
    wanted = f"at least 0, at most {most}", f"at least 0, and finite: 0, or from {TINY} to {HUGE}"
    is_right = lambda x: x == 0 or _is_usual(x)  # noqa: E731
    return _problems(config, name, names, wanted, lambda x: 0 <= x <= most, is_right)


def finite(config, name: str, *names: str) -> list[str]:
    """Returns the problems of floats that must be finite."""
    wanted = "", f"finite, from -{HUGE} to {HUGE}"
    return _problems(config, name, names, wanted, lambda x: True, lambda x: abs(x) <= HUGE)


def between(config, name: str, attribute: str, low: float, high: float) -> list[str]:
    """Returns the problem of a number that does not lie between two others, which may be it."""
    value = getattr(config, attribute)
    if value is None or low <= value <= high:
        return []
    return [f"{name}.{attribute}={value} must lie between {low} and {high}"]


def one_of(config, name: str, attribute: str, allowed: tuple[str, ...]) -> list[str]:
    """Returns the problem of an attribute that has none of its allowed values."""
    value = getattr(config, attribute)
    if value in allowed:
        return []
    return [f"{name}.{attribute}={shown(value)} must be one of {allowed}"]


def shown(value) -> str:
    """Returns a value for a message, cut where it is longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _is_usual(x: float) -> bool:
    return TINY <= x <= HUGE  # False for NaN


def _problems(config, name, names, wanted: tuple[str, str], is_right, is_right_float) -> list[str]:
    """Returns the numbers that are wrong; wanted: what integers, and what floats, must be."""
    found = []
    for n in names or tuple(f.name for f in dataclasses.fields(config)):
        x = getattr(config, n)
        if isinstance(x, float) and not is_right_float(x):
            found.append(f"{name}.{n}={x} must be {wanted[1]}")
        elif type(x) is int and not is_right(x):
            found.append(f"{name}.{n}={x} must be {wanted[0]}")
    return found
