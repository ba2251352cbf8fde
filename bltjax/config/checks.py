"""Checks of single settings. Each returns a list of problems, empty where all is well."""

import dataclasses
import math


def positive(config, name: str, *names: str) -> list[str]:
    """Returns the problems of settings that must be above 0; by default of all numbers."""
    return _problems(config, name, names, lambda value: value > 0, "positive")


def not_negative(config, name: str, *names: str) -> list[str]:
    """Returns the problems of settings that must be finite numbers, 0 or more."""
    at_least_0 = "at least 0, and finite"
    return _problems(config, name, names, lambda value: 0 <= value < math.inf, at_least_0)


def finite(config, name: str, *names: str) -> list[str]:
    """Returns the problems of settings that must be finite; by default of all numbers."""
    return _problems(config, name, names, math.isfinite, "finite")


def one_of(config, name: str, attribute: str, allowed: tuple[str, ...]) -> list[str]:
    """Returns the problem of an attribute that has none of its allowed values."""
    value = getattr(config, attribute)
    return [] if value in allowed else [f"{name}.{attribute}={value!r} must be one of {allowed}"]


def _problems(config, name: str, names: tuple[str, ...], is_right, wanted: str) -> list[str]:
    names = names or tuple(f.name for f in dataclasses.fields(config))
    values = ((n, getattr(config, n)) for n in names)
    numbers = ((n, x) for n, x in values if isinstance(x, int | float) and type(x) is not bool)
    # `not`, so that NaN is wrong
    return [f"{name}.{n}={x} must be {wanted}" for n, x in numbers if not is_right(x)]
