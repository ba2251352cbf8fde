"""Checks of single settings. Each returns a list of problems, empty where all is well."""

import math


def positive(config, name: str, *names: str) -> list[str]:
    """Returns the problems of attributes that must be above 0, or None."""
    return [
        f"{name}.{n}={getattr(config, n)} must be positive"
        for n in names
        if getattr(config, n) is not None and not getattr(config, n) > 0  # NaN too
    ]


def finite(config, name: str, *names: str) -> list[str]:
    """Returns the problems of attributes that must be finite, or None."""
    return [
        f"{name}.{n}={getattr(config, n)} must be finite"
        for n in names
        if getattr(config, n) is not None and not math.isfinite(getattr(config, n))
    ]


def one_of(config, name: str, attribute: str, allowed: tuple[str, ...]) -> list[str]:
    """Returns the problem of an attribute that has none of its allowed values."""
    value = getattr(config, attribute)
    return [] if value in allowed else [f"{name}.{attribute}={value!r} must be one of {allowed}"]
