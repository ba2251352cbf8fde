"""Checks of single settings. Each returns a list of problems, empty where all is well."""

import dataclasses
import math


def positive(config, name: str, *names: str) -> list[str]:
    """Returns the problems of settings that must be above 0; by default of all numbers."""
    return [
        f"{name}.{n}={value} must be positive"
        for n, value in _numbers(config, names)
        if not value > 0  # NaN too
    ]


def finite(config, name: str, *names: str) -> list[str]:
    """Returns the problems of settings that must be finite; by default of all numbers."""
    return [
        f"{name}.{n}={value} must be finite"
        for n, value in _numbers(config, names)
        if not math.isfinite(value)
    ]


def one_of(config, name: str, attribute: str, allowed: tuple[str, ...]) -> list[str]:
    """Returns the problem of an attribute that has none of its allowed values."""
    value = getattr(config, attribute)
    return [] if value in allowed else [f"{name}.{attribute}={value!r} must be one of {allowed}"]


def _numbers(config, names: tuple[str, ...]) -> list[tuple[str, int | float]]:
    """Returns (name, value) of the named settings, or of all, that are numbers."""
    values = [
        (n, getattr(config, n)) for n in names or [f.name for f in dataclasses.fields(config)]
    ]
    return [(n, x) for n, x in values if type(x) in (int, float)]
