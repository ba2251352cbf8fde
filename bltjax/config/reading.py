"""Turns config files, ConfigDicts and plain dicts into the dataclasses of settings, and back."""

import dataclasses
import difflib
import itertools
import os
import runpy
import types
import typing
from collections.abc import Mapping
from pathlib import Path

import ml_collections
from ml_collections import config_dict

from bltjax.config.run import RunConfig

# Settings that may change between the runs of one working directory: which stages to run, on what,
# and what is logged. (Another mesh adds in another order: results are equal up to rounding.)
FREE_FIELDS = (
    "stages",
    "mesh",
    "accumulation_steps",
    "remat",
    "workers",
    "log_every",
    "validate_every",
    "validation_rows",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "profile",
)


# In a wheel configs/ lies inside the package, in a checkout beside it.
CONFIGS = tuple(Path(__file__).parents[up] / "configs" for up in (1, 2))


def config_path(name: str) -> str:
    """Returns the file of a config: of a path, or of a name such as "quickstart".

    What follows a colon is for the file's get_config and stays: "studies/blt:laptop". Raises
    FileNotFoundError that lists the names.
    """
    path, colon, argument = name.partition(":")
    candidates = [Path(path), *(d / f"{path.removesuffix('.py')}.py" for d in CONFIGS)]
    for candidate in candidates:
        if candidate.is_file():
            return f"{candidate}{colon}{argument}"
    names = sorted(
        {p.relative_to(d).with_suffix("").as_posix() for d in CONFIGS for p in d.rglob("*.py")}
    )
    raise FileNotFoundError(
        f"{path!r} is neither a file nor the name of a config: give the path of a file, or one of "
        f"{', '.join(names)}"
    )


def read_config(path: str | os.PathLike, settings: Mapping | None = None) -> RunConfig:
    """Reads the settings in a config file, as the command line reads them.

    path: what `--config=` takes, see `config_path`. settings: those of `--config.NAME=VALUE`, such
    as {"blt.remat": "full"}. Raises OSError, ValueError, and what the file raises.
    """
    name, *argument = config_path(os.fspath(path)).split(":", 1)
    config = runpy.run_path(name)["get_config"](*argument)
    config.update_from_flattened_dict(settings or {})
    return from_config_dict(RunConfig, config)


def default_config(cls=RunConfig) -> ml_collections.ConfigDict:
    """Returns all settings at their defaults, as a ConfigDict for a config file to edit."""
    return to_config_dict(cls())


def to_config_dict(config) -> ml_collections.ConfigDict:
    """Turns a dataclass into a ConfigDict; optional fields become typed placeholders."""
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif _is_optional(hints[f.name]):
            result[f.name] = config_dict.placeholder(_plain_type(hints[f.name]))
        result[f.name] = value
    return result


def from_config_dict(cls, config, name: str = "config"):
    """Turns a ConfigDict (or a nested dict) into the frozen dataclass `cls`.

    Raises ValueError that names the field and the value: unknown key (with the nearest known
    one), wrong type, or a value that no model could have.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key in config:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1) or sorted(fields)
            raise ValueError(f"{name}.{key} is not a setting; did you mean {', '.join(near)}?")
        values[key] = _coerce(hints[key], config[key], f"{name}.{key}")
    return cls(**values)


def _coerce(hint, value, name: str):
    if dataclasses.is_dataclass(hint):
        if not hasattr(value, "keys"):
            raise ValueError(f"{name}={value!r} must be a group of settings, not a value")
        return from_config_dict(hint, value, name)
    if value is None and _is_optional(hint):
        return None
    plain = _plain_type(hint)
    if plain is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name}={value!r} must be a tuple")
        return tuple(
            _coerce(typing.get_args(hint)[0], v, f"{name}[{i}]") for i, v in enumerate(value)
        )
    if type(value) is int and abs(value) >= 2**63:
        raise ValueError(f"{name}={str(value)[:20]}... is no number of a model: correct it")
    if plain is float and type(value) is int:
        return float(value)
    if type(value) is not plain:
        raise ValueError(f"{name}={value!r} is {type(value).__name__}, must be {plain.__name__}")
    return value


def _is_optional(hint) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _plain_type(hint):
    if _is_optional(hint):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    return typing.get_origin(hint) or hint


def to_dict(config) -> dict:
    """Turns a dataclass into nested dicts for JSON, with lists for tuples."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def differences(old, new, name: str = "config", skipped=FREE_FIELDS) -> list[str]:
    """Returns lines on the values that differ between two dicts as JSON has them, but `skipped`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new} - set(skipped))
        pairs = [(f"{name}.{key}", old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and dict in map(type, old + new):
        pairs = [(f"{name}[{i}]", *both) for i, both in enumerate(itertools.zip_longest(old, new))]
    else:
        return [] if old == new else [f"{name}: {old!r} there, {new!r} here"]
    return [line for pair in pairs for line in differences(pair[1], pair[2], pair[0], skipped)]
