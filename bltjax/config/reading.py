"""Turns config files, ConfigDicts and plain dicts into the dataclasses of settings, and back."""

import dataclasses
import difflib
import itertools
import os
import runpy
import traceback
import types
import typing
from collections.abc import Mapping
from pathlib import Path

import ml_collections
from ml_collections import config_dict

from bltjax.config.checks import shown
from bltjax.config.names import groups, unknown
from bltjax.config.names import settings as known_settings
from bltjax.config.run import RunConfig

# Settings that may change between the runs of one working directory: which stages to run, on what,
# and what is logged. (Another mesh adds in another order: results are equal up to rounding.)
FREE_FIELDS = (
    "stages",
    "mesh",
    "accumulation_steps",
    "remat",
    "attention",
    "attention_block",
    "workers",
    "cache",
    "cache_bytes",
    "log_every",
    "validate_every",
    "validation_rows",
    "patch_use_rows",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "profile",
)

# Settings of models and of patching that most models do not have, and what they are then.
OPTIONS = dict(
    qkv_bias=False,
    qk_norm=False,
    rope_factor=1.0,
    rope_original_positions=None,
    turns=False,
    diffusion_block=0,
)

# Of the device that computes a model, not of the model.
DEVICE_FIELDS = "attention", "attention_block"

# In a wheel configs/ lies inside the package, in a checkout beside it.
CONFIGS = tuple(Path(__file__).parents[up] / "configs" for up in (1, 2))


def config_path(name: str) -> str:
    """Returns the file of a config: of a path, or of a name such as "quickstart".

    What follows a colon is for the file's get_config and stays: "studies/blt:laptop". Raises
    FileNotFoundError that names the nearest one and lists all.
    """
    path, colon, argument = name.partition(":")
    path = os.path.expanduser(path)
    candidates = [Path(path), *(d / f"{path.removesuffix('.py')}.py" for d in CONFIGS)]
    for candidate in candidates:
        if _is_file(candidate):
            return f"{candidate}{colon}{argument}"
    names = sorted(
        {p.relative_to(d).with_suffix("").as_posix() for d in CONFIGS for p in d.rglob("*.py")}
    )
    raise FileNotFoundError(
        f"{path[:300]!r} is neither a file nor the name of a config: {_meant(path, names)}give "
        f"the path of a file, or one of {', '.join(names)}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


def _meant(path: str, names: list[str]) -> str:
    """Returns a question after the nearest file beside a path, or the nearest name, if any."""
    folder, last = os.path.split(path.removesuffix(".py"))
    beside = [p.stem for p in Path(folder).glob("*.py")] if os.path.isdir(folder or ".") else []
    if near := difflib.get_close_matches(last, beside, n=1):
        return f"did you mean {os.path.join(folder, near[0])}.py? Else "
    near = difflib.get_close_matches(last, names, n=1)
    return f"did you mean {near[0]}? Else " if near else ""


def read_config(path: str | os.PathLike, settings: Mapping | None = None) -> RunConfig:
    """Reads the settings in a config file, as the command line reads them.

    path: what `--config=` takes, see `config_path`. settings: those of `--config.NAME=VALUE`, such
    as {"blt.remat": "full"}. Raises OSError, and ValueError for a file or a setting that is wrong.
    """
    config = config_of_file(path)
    for name, value in (settings or {}).items():
        if name not in known_settings() and name not in groups():
            raise ValueError(unknown(name))
        try:
            with config.unlocked():
                config.update_from_flattened_dict({name: value})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            message = f"config.{name}={shown(value)} cannot be set: {_reason(error)}"
            raise ValueError(message) from error
    return from_config_dict(RunConfig, config)


def config_of_file(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """Returns what get_config of a config file returns; see `read_config`."""
    name, *argument = config_path(os.fspath(path)).split(":", 1)
    try:
        found = runpy.run_path(name)
        config = found["get_config"](*argument) if "get_config" in found else None
    except (Exception, SystemExit) as error:  # one that ends the process would do so in silence
        if isinstance(error, OSError) and error.filename == name:
            raise
        where, kind = f"{name}{_line(error, name)}", type(error).__name__
        raise ValueError(f"{where}: {kind}: {_reason(error)}") from error
    if "get_config" not in found:
        raise ValueError(f"{name} has no function get_config, which returns the config: add it")
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"get_config of {name} returns {type(config).__name__}: begin it with config = "
            "bltjax.config.default_config() and end it with return config"
        )
    return config


def _line(error: BaseException, file: str) -> str:
    """Returns the line of a config file at which an error came, for a message."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def _reason(error: BaseException) -> str:
    """Returns what an error says on one line, without the quotes that Python puts around a key."""
    said: object = error
    while isinstance(said, (AttributeError, KeyError)) and said.args:
        said = said.args[0]
    return " ".join(str(said).split())


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
        elif isinstance(value, tuple):
            value = tuple(to_config_dict(v) if dataclasses.is_dataclass(v) else v for v in value)
        elif is_optional(hints[f.name]):
            result[f.name] = config_dict.placeholder(plain_type(hints[f.name]))
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
            raise ValueError(_unknown_key(cls, fields, name, str(key)))
        values[key] = _coerce(hints[key], config[key], f"{name}.{key}")
    return cls(**values)


def _unknown_key(cls, fields: set[str], name: str, key: str) -> str:
    if name == "config" or name.removeprefix("config.") in groups():
        return unknown(f"{name}.{key}".removeprefix("config."))
    near = difflib.get_close_matches(key, fields, n=1) or sorted(fields)
    return f"{name}.{key} is not a setting: did you mean {', '.join(near)}?"


def _coerce(hint, value, name: str):
    if dataclasses.is_dataclass(hint):
        if not hasattr(value, "keys"):
            raise ValueError(f"{name}={shown(value)} must be a group of settings, not a value")
        return from_config_dict(hint, value, name)
    if value is None and is_optional(hint):
        return None
    plain = plain_type(hint)
    if plain is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name}={shown(value)} must be a tuple")
        return tuple(
            _coerce(typing.get_args(hint)[0], v, f"{name}[{i}]") for i, v in enumerate(value)
        )
    if type(value) is int and abs(value) >= 2**63:
        raise ValueError(f"{name}={shown(value)} must be less than 2**63")
    if plain is float and type(value) is int:
        return float(value)
    if type(value) is not plain:
        raise ValueError(
            f"{name}={shown(value)} is {type(value).__name__}, must be {plain.__name__}"
        )
    return value


def is_optional(hint) -> bool:
    """Returns whether a setting of this type may be None."""
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def plain_type(hint):
    """Returns the class of the values of a type, but None."""
    if is_optional(hint):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    return typing.get_origin(hint) or hint


def to_dict(config) -> dict:
    """Turns a dataclass into nested dicts for JSON, with lists for tuples."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def to_model_dict(config) -> dict:
    """Returns `to_dict` without what is not of the model, for files that describe one.

    That is DEVICE_FIELDS, and adapters: where a model is written they are part of its matrices.
    OPTIONS that are off are left out too, as in files that are older than these.
    """
    left_out = (*DEVICE_FIELDS, "lora")
    described = {key: value for key, value in to_dict(config).items() if key not in left_out}
    return _without_options(described)


def _without_options(described: dict) -> dict:
    return {
        key: _without_options(value) if isinstance(value, dict) else value
        for key, value in described.items()
        if key not in OPTIONS or value != OPTIONS[key]
    }


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
