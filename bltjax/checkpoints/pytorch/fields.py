"""Converts settings between a published format and ours by one table of pairs.

A format's settings are a JSON object. Its fields are taken one by one, so that an unknown field is
noticed.
"""

import difflib
import itertools
import json
import math
import operator
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bltjax.checkpoints.lazy_arrays import insert
from bltjax.runtime import buckets
from bltjax.runtime.plain_files import parse_json, read_bytes, reason
from bltjax.runtime.terminal import short

REQUIRED = object()
LARGEST = 2**28  # limit of whole numbers; sizes of models are far below
DEEPEST = 20  # limit of nesting
MOST_UNKNOWN = 20  # fields that are named, since looking for the nearest one takes time


class Pair(NamedTuple):
    """One of our settings and the field of the format that holds it.

    Several of our settings may share a field; to be written they must be equal.
    """

    ours: str  # dotted path
    theirs: str  # dotted path
    kind: type
    default: Any = REQUIRED  # value of a field that is absent or null


def read_json(path: Path, problems: list[str]) -> dict:
    """Reads the JSON object in a file; returns {} and adds a problem where there is none."""
    try:
        values = parse_json(read_bytes(path))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return {}
    except buckets.Unreachable:
        raise
    except (OSError, ValueError) as error:
        told = f"{path.name} cannot be read as JSON ({reason(error)})"
        problems.append(f"{told}: put a whole one in its place")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{path.name} holds a {type(values).__name__}, must be an object")
        return {}
    level: list = [values]
    for _ in range(DEEPEST):
        level = [v for group in level for v in _values(group) if isinstance(v, (dict, list))]
    if level:
        problems.append(f"{path.name} holds values more than {DEEPEST} deep: correct it")
        return {}
    return values


def _values(group: dict | list) -> Iterable:
    return group.values() if isinstance(group, dict) else group


class Fields:
    """Fields of a JSON object, taken by dotted path.

    problems: what is wrong with them. assumed: defaults by path, where the object says nothing.
    """

    def __init__(self, name: str, values: dict):
        self.name, self.values, self.problems = name, values, []
        self.assumed: dict[str, Any] = {}
        self._taken: set[str] = set()

    def take(self, path: str, kind: type, default=REQUIRED, least: float = -math.inf):
        """Returns the value of a field, or its default where it is absent or null.

        Whole numbers are accepted as floats and the other way round. A field that is missing
        without a default, has another type, or is less than `least`, is a problem and gives None.
        """
        self._taken.add(path)
        value = self._get(path)
        if value is None:
            if default is not REQUIRED:
                self._assume(path, default)
                return default
            self._problem(f"{self.name}.{path} is missing")
            return None
        if type(value) in (int, float) and not abs(value) < (
            LARGEST if kind in (int, tuple) or type(value) is int else math.inf
        ):
            self._problem(f"{self.name}.{path}={short(value)} is no number of a model: correct it")
            return None
        if type(value) in (int, float) and value < least:
            self._problem(f"{self.name}.{path}={short(value)} must be at least {least}: correct it")
            return None
        if kind is int and type(value) is float and value.is_integer():
            return int(value)
        if kind is float and type(value) is int:
            return float(value)
        if kind is tuple and type(value) is list and all(type(v) is int for v in value):
            return tuple(value)
        if type(value) is not kind:
            wanted = "a list of whole numbers" if kind is tuple else kind.__name__
            self._problem(
                f"{self.name}.{path}={short(value)} is {type(value).__name__}, must be {wanted}"
            )
            return None
        return value

    def must_be(self, path: str, allowed: Collection, why: str, assume=None):
        """Checks that a field is absent, null, or one of the allowed values.

        assume: what an absent field is taken for, where nothing else tells.
        """
        self._taken.add(path)
        value = self._get(path)
        if value is None and assume is not None:
            self._assume(path, assume)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            self._problem(f"{self.name}.{path}={short(value)} is not supported: {why}")

    def must_not_be_null(self, path: str, why: str):
        """Checks that a field whose null does not mean its default is not null."""
        if self._says(path) and self._get(path) is None:
            self._problem(f"{self.name}.{path}=null is not supported: {why}")

    def notes(self) -> tuple[str, ...]:
        """Returns a note that names all values that were assumed, or none."""
        values = (f"{path}={json.dumps(value)}" for path, value in self.assumed.items())
        told = ", ".join(values)
        return (f"{self.name} does not say, so it is assumed: {told}",) if told else ()

    def ignore(self, paths: Iterable[str]):
        """Accepts fields that change nothing here, whatever their value."""
        self._taken.update(paths)

    def check_all_known(self):
        """Adds a problem for each field that was neither taken nor ignored."""
        groups = {group for known in self._taken for group in _prefixes(known)}
        unknown = [
            path
            for path in _paths(self.values)
            if self._taken.isdisjoint(_prefixes(path))
            and (self._get(path) or path not in groups)  # not a group that says nothing
        ]
        for path in unknown[:MOST_UNKNOWN]:
            near = difflib.get_close_matches(path, self._taken, n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it if it changes nothing"
            self._problem(
                f"{self.name}.{path}={short(self._get(path))} is a field that nobody knows: {hint}"
            )
        if (more := len(unknown) - MOST_UNKNOWN) > 0:
            self._problem(f"{self.name} has {more} more fields that nobody knows: remove them")

    def _get(self, path: str):
        value = self.values
        for key in path.split("."):
            if not isinstance(value, dict):
                return None
            value = value.get(key)
        return value

    def _says(self, path: str) -> bool:
        """Returns whether a field is there, be it null."""
        *groups, last = path.split(".")
        group = self._get(".".join(groups)) if groups else self.values
        return isinstance(group, dict) and last in group

    def _assume(self, path: str, value):
        if value not in (None, ()) or not self._says(path):  # else null says it
            self.assumed[path] = value

    def _problem(self, text: str):
        if text not in self.problems:  # several of our settings may share a field
            self.problems.append(text)


def read_pairs(fields: Fields, pairs: Iterable[Pair]) -> dict:
    """Reads our settings from a format's fields, as a nested dict."""
    ours: dict = {}
    for pair in pairs:
        value = fields.take(pair.theirs, pair.kind, pair.default)
        insert(ours, pair.ours.split("."), value)
    return ours


def write_pairs(config, pairs: Iterable[Pair], problems: list[str]) -> dict:
    """Writes our settings as a format's nested dict; adds a problem where ours contradict."""
    theirs: dict = {}
    source: dict[str, tuple[str, Any]] = {}
    for pair in pairs:
        value = operator.attrgetter(pair.ours)(config)
        first, there = source.setdefault(pair.theirs, (pair.ours, value))
        if there != value:
            problems.append(
                f"{first}={there!r} and {pair.ours}={value!r} differ: the format has one field for "
                f"both, {pair.theirs}"
            )
        plain = list(value) if isinstance(value, tuple) else value
        insert(theirs, pair.theirs.split("."), plain)
    return theirs


def problems_in_their_words(config, name: str, pairs: Iterable[Pair]) -> list[str]:
    """Returns the problems of our settings, called `name`, in terms of the format's fields."""
    longest_first = sorted(pairs, key=lambda pair: -len(pair.ours))
    told = []
    for problem in config.problems(name):
        for pair in longest_first:
            problem = problem.replace(f"{name}.{pair.ours}", f"{name}.{pair.theirs}")
        told.append(problem)
    return list(dict.fromkeys(told))  # two of our settings may share a field


def merged(*trees: dict) -> dict:
    """Merges nested dicts; values of later ones win."""
    result: dict = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def _paths(values: dict, prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        path = prefix + (repr(key) if "." in key else key)  # a dot is no way into a group
        if isinstance(value, dict) and value:
            yield from _paths(value, f"{path}.")
        else:
            yield path


def _prefixes(path: str) -> Iterable[str]:
    """Yields a, a.b and a.b.c for a.b.c."""
    return itertools.accumulate(path.split("."), "{}.{}".format)
