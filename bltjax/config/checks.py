"""Checks of single settings; each returns a list of problems."""

import math


def positive(config, name: str, *names: str) -> list[str]:
    """Problems of the attributes that must be above 0; optional ones may be None."""
    return [
        f"{name}.{n}={getattr(config, n)} must be positive"
        for n in names
        if getattr(config, n) is not None and not getattr(config, n) > 0  # NaN too
    ]


def finite(config, name: str, *names: str) -> list[str]:
    """Problems of the attributes that must be finite; optional ones may be None."""
    return [
        f"{name}.{n}={getattr(config, n)} must be finite"
        for n in names
        if getattr(config, n) is not None and not math.isfinite(getattr(config, n))
    ]


def one_of(config, name: str, attribute: str, allowed: tuple[str, ...]) -> list[str]:
    """The problem of an attribute outside its allowed values."""
    value = getattr(config, attribute)
    return [] if value in allowed else [f"{name}.{attribute}={value!r} must be one of {allowed}"]
