"""Lists the settings with their meanings, and finds the setting that somebody meant."""

import ast
import dataclasses
import functools
import inspect
import io
import math
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from bltjax.config.run import RunConfig

MOST_NAMED = 8  # names in a message: seven parts of models have num_heads
MOST_LETTERS = 200  # of a name that is looked up and shown: settings have up to 50
LEVEL = 1.5  # cost of a level that is missing or too many, in letters
PART_OF_NAME = 1.5  # cost of "training" in the place of "blt_training"


class Setting(NamedTuple):
    """A setting. `name` is what follows `config.`, as in "blt.hash.vocab"; `hint` is its type."""

    name: str
    hint: Any
    default: Any
    meaning: str


@functools.cache
def settings() -> dict[str, Setting]:
    """Returns every setting by its name, in the order of the classes of settings."""
    return {setting.name: setting for setting in in_group(RunConfig(), "")}


@functools.cache
def groups() -> dict[str, type]:
    """Returns the class of every group of settings by its name, such as "blt.hash"."""
    found: dict[str, type] = {}
    for name in settings():
        cls: type = RunConfig
        path: list[str] = []
        for part in name.split(".")[:-1]:
            cls = typing.get_type_hints(cls)[part]
            path.append(part)
            found[".".join(path)] = cls
    return found


def in_group(config, prefix: str) -> Iterator[Setting]:
    """Yields the settings of a group at its defaults, with `prefix` before their names."""
    hints, said = typing.get_type_hints(type(config)), meanings(type(config))  # type: ignore[arg-type]
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from in_group(value, f"{name}.")
        else:
            yield Setting(name, hints[field.name], value, said[field.name])


@functools.cache
def meanings(cls) -> dict[str, str]:
    """Returns the comment on each field of a dataclass: after it, or in the lines above it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            source = inspect.getsource(typing.cast(type, base))
            found |= _comments_on_fields(textwrap.dedent(source))
    return found


def _comments_on_fields(source: str) -> dict[str, str]:
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    lines = source.splitlines()
    found: dict[str, str] = {}
    (definition,) = ast.parse(source).body
    for node in definition.body if isinstance(definition, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above: list[str] = []
            line = node.lineno - 1
            while lines[line - 1].lstrip().startswith("#"):
                above.insert(0, comments[line])
                line -= 1
            found[node.target.id] = comments.get(node.lineno) or " ".join(above)
    return found


def type_name(hint) -> str:
    """Returns the type of a setting in words, such as "int or None" or "tuple of str"."""
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(h) for h in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"tuple of {type_name(typing.get_args(hint)[0])}"
    return "None" if hint is type(None) else hint.__name__


def unknown(name: str, prefix: str = "config.") -> str:
    """Returns the message on a name that is no setting, with the nearest names that are.

    prefix: what stands before the names, "--config." on the command line.
    """
    if name.startswith("data.sources"):
        return (
            f"{prefix}{name[:MOST_LETTERS]} is part of a list: give the whole of "
            f"{prefix}data.sources, in a config file say"
        )
    near = nearest(name[:MOST_LETTERS])
    named = [f"{prefix}{n}" for n in near[:MOST_NAMED]]
    meant = f"{', '.join(named[:-1])} or {named[-1]}" if len(named) > 1 else named[0]
    return f"{prefix}{name[:MOST_LETTERS]} is not a setting: did you mean {meant}?"


def nearest(name: str) -> list[str]:
    """Returns the settings, or groups of them, that differ least from a name that is neither.

    Counted are letters that are added, left out, replaced or swapped, levels that are missing or
    too many, and parts of names. Case and dashes do not count.
    """
    typed = _levels(name)
    costs = {known: _levels_cost(typed, _levels(known)) for known in (*settings(), *groups())}
    least = min(costs.values())
    for known, cost in costs.items():  # a letter of another kind: a dot
        if len(typed) != known.count(".") + 1 and abs(len(name) - len(known)) <= least:
            costs[known] = min(cost, letters(".".join(typed), known))
            least = min(least, costs[known])
    return [known for known, cost in costs.items() if cost == least]


def _levels(name: str) -> tuple[str, ...]:
    return tuple(name.lower().replace("-", "_").split("."))


def _levels_cost(typed: tuple[str, ...], known: tuple[str, ...]) -> float:
    """Returns the least cost that turns levels into others; the last is one and the same."""
    row = [LEVEL * j for j in range(len(known))]
    for i, level in enumerate(typed[:-1], 1):
        before, row = row, [LEVEL * i]
        for j, other in enumerate(known[:-1], 1):
            changed = before[j - 1] + _level_cost(level, other)
            row.append(min(changed, before[j] + LEVEL, row[j - 1] + LEVEL))
    return row[-1] + _level_cost(typed[-1], known[-1])


@functools.cache
def _level_cost(typed: str, known: str) -> float:
    if typed == known:
        return 0.0
    words = known.split("_")
    parts = {"_".join(words[:i]) for i in range(1, len(words))}
    parts |= {"_".join(words[i:]) for i in range(1, len(words))}
    least = min((letters(typed, part) for part in parts if len(part) > 3), default=math.inf)
    return min(letters(typed, known), least + PART_OF_NAME)


def letters(a: str, b: str) -> int:
    """Returns how many letters to add, leave out, replace or swap to make b of a."""
    older: list[int] = []
    before = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            least = min(before[j - 1] + (letter != other), before[j] + 1, row[j - 1] + 1)
            if i > 1 < j and letter == b[j - 2] and a[i - 2] == other:
                least = min(least, older[j - 2] + 1)
            row.append(least)
        older, before = before, row
    return before[-1]
