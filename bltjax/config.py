"""Every setting of a run, as frozen dataclasses, and all validation of them.

`ml_collections` stops at the edge: a file in `configs/` edits the ConfigDict that
`default_config()` makes from these classes, the command line edits it further, and
`from_config_dict` turns it back into dataclasses, checking names, types and values.
"""

import dataclasses
import difflib
import importlib.util
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_collections
from ml_collections import config_dict

from bltjax.data_config import DataConfig, SourceConfig
from bltjax.model_config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    HashConfig,
    InitConfig,
    TokenModelConfig,
    TransformerConfig,
    finite,
    one_of,
    positive,
)
from bltjax.training_config import OF_BLT_PARTS, OptimizerConfig, ProfileConfig, TrainingConfig

__all__ = [  # the settings of models, data and training are reached through this module too
    "BLTConfig",
    "CrossAttentionConfig",
    "DataConfig",
    "EntropyModelConfig",
    "EvaluationConfig",
    "HashConfig",
    "InitConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PatchingConfig",
    "ProfileConfig",
    "RunConfig",
    "SourceConfig",
    "TokenModelConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "TransformerConfig",
    "default_config",
    "differences",
    "from_config_dict",
    "to_config_dict",
    "to_dict",
]

PATCHING_RULES = ("entropy", "monotonic", "global_monotonic", "space", "static", "byte", "bpe")
ENTROPY_RULES = ("entropy", "monotonic", "global_monotonic")
STAGES = ("entropy_model", "entropies", "blt", "evaluate", "sample")  # of a BLT
ALL_STAGES = (*STAGES, "token_model")


@dataclass(frozen=True)
class PatchingConfig:
    """Where patches start (spec 2)."""

    rule: str = "entropy"  # one of PATCHING_RULES
    target_patch_bytes: float | None = 4.5  # entropy rules: calibrate the threshold to this mean
    threshold: float = 1.335442066192627  # nats; used where target_patch_bytes is None
    threshold_add: float = 0.0  # nats; the difference threshold of global_monotonic
    patch_size: int = 4  # static rule
    max_patch_length: int | None = None
    reset_at_newlines: bool = False  # the entropy model forgets at newlines (paper 4.4)
    published_skip_at_3: bool = False  # replicate "never a start at 3" (spec 2.4)
    bf16_compat: bool = False  # round as the published demo does (spec 2.9)
    in_step: bool = False  # the training step finds patches, with a frozen entropy model

    def problems(self, name: str) -> list[str]:
        found = one_of(self, name, "rule", PATCHING_RULES) + positive(self, name, "patch_size")
        found += finite(self, name, "threshold", "threshold_add")
        if self.max_patch_length is not None and self.max_patch_length < 1:
            found.append(f"{name}.max_patch_length={self.max_patch_length} must be at least 1")
        if self.target_patch_bytes is not None and self.target_patch_bytes < 1:
            found.append(f"{name}.target_patch_bytes={self.target_patch_bytes} must be at least 1")
        if self.rule == "global_monotonic" and self.target_patch_bytes is not None:
            found.append(
                f"{name}.target_patch_bytes={self.target_patch_bytes} cannot be reached "
                f"with {name}.rule={self.rule!r}, which has two thresholds: set "
                "target_patch_bytes to None in the config file, and threshold and threshold_add"
            )
        return found


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the ids of the token model come from."""

    path: str = ""  # a tokenizer.json of another run; empty: it is trained
    train_bytes: int = 20_000_000  # of training documents, in a seeded order, that it is trained on

    def problems(self, name: str) -> list[str]:
        return positive(self, name, "train_bytes")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1, it takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def problems(self, name: str) -> list[str]:
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            return [f"{name}={sizes}: axes must be at least 1, and only one may be -1"]
        return []


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured and shown at the end of a run."""

    batch_size: int = 8
    max_bytes: int = 100_000_000  # of held-out documents, about
    baselines: bool = True  # fit n-gram models on the training bytes
    prompt: str = "def "
    sample_bytes: int = 200
    temperature: float = 0.7
    sentence: str = "Patches are short where text is hard and long where it is easy."

    def problems(self, name: str) -> list[str]:
        return positive(self, name, "batch_size", "max_bytes", "sample_bytes")


@dataclass(frozen=True)
class RunConfig:
    """A run: the stages it goes through and the settings of each."""

    stages: tuple[str, ...] = STAGES
    data: DataConfig = DataConfig()
    patching: PatchingConfig = PatchingConfig()
    entropy_model: EntropyModelConfig = EntropyModelConfig()
    entropy_training: TrainingConfig = TrainingConfig()
    blt: BLTConfig = BLTConfig()
    blt_training: TrainingConfig = TrainingConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    token_model: TokenModelConfig = TokenModelConfig()
    token_training: TrainingConfig = TrainingConfig()  # its row_bytes are tokens of a row
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self):
        found = [
            p
            for f in dataclasses.fields(self)
            if f.name != "stages"
            for p in getattr(self, f.name).problems(f.name)
        ]
        unknown = [s for s in self.stages if s not in ALL_STAGES]
        if unknown or not self.stages:
            found.append(f"stages={self.stages} must be one or more of {ALL_STAGES}")
        found += self._profile_problems()
        found += self._patchless_problems("entropy_training", "entropy model")
        found += self._patchless_problems("token_training", "token model")
        if found:
            raise ValueError("; ".join(found))

    def _patchless_problems(self, name: str, model: str) -> list[str]:
        """Settings that would change nothing, of a model that is no BLT."""
        training, found = getattr(self, name), []
        for setting in OF_BLT_PARTS:
            value, default = (getattr(o, setting) for o in (training.optimizer, OptimizerConfig()))
            if value != default:
                found.append(
                    f"{name}.optimizer.{setting}={value!r} changes nothing: the {model} has no "
                    f"such part, leave it {default!r}"
                )
        if training.row_bytes == 0 < training.row_patches:
            found.append(f"{name}.row_bytes=0 must be at least 8: its rows have no patches")
        return found

    def _profile_problems(self) -> list[str]:
        first, stage = self.profile.first_step, self.profile.stage
        if first is None or self.profile.problems("profile"):
            return []
        if stage not in self.stages:
            return [f"profile.stage={stage!r} is none of stages={self.stages}: choose one of them"]
        _, training = self.trained(stage)
        if first >= training.steps:
            return [f"profile.first_step={first} is not below the {training.steps} of {stage}"]
        return []

    def trained(self, stage: str):
        """(model, training) of one of the stages entropy_model, blt and token_model."""
        short = dict(entropy_model="entropy", blt="blt", token_model="token")[stage]
        return getattr(self, stage), getattr(self, f"{short}_training")


# Settings that may change between the runs of one working directory: which stages to do now, where
# they run and how they are watched. (Another mesh adds in another order: equal up to rounding.)
FREE_FIELDS = (
    "stages",
    "mesh",
    "accumulation_steps",
    "remat",
    "workers",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "profile",
)


def read_config(path: str | os.PathLike, settings: Mapping | None = None) -> RunConfig:
    """The settings in a file of `configs/`, as the command line reads them.

    `path` is what `--config=` takes: "configs/quickstart.py", or with what the file's get_config is
    given, "configs/studies/blt.py:laptop". `settings` are those of `--config.NAME=VALUE`, such as
    {"blt.remat": "full"}. Raises OSError, ValueError, and what the file raises.
    """
    name, *argument = os.fspath(path).split(":", 1)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*argument)
    config.update_from_flattened_dict(settings or {})
    return from_config_dict(RunConfig, config)


def default_config(cls=RunConfig) -> ml_collections.ConfigDict:
    """All settings at their defaults, as a ConfigDict for a file in `configs/` to edit."""
    return to_config_dict(cls())


def to_config_dict(config) -> ml_collections.ConfigDict:
    """A dataclass as a ConfigDict; optional fields become typed placeholders."""
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            result[f.name] = to_config_dict(value)
        elif _is_optional(hints[f.name]):
            result[f.name] = config_dict.placeholder(_plain_type(hints[f.name]))
            result[f.name] = value
        else:
            result[f.name] = value
    return result


def from_config_dict(cls, config, name: str = "config"):
    """The frozen dataclass that a ConfigDict (or a nested dict) describes.

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
    """A dataclass as nested plain dicts (JSON-ready, tuples as lists)."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def differences(old: dict, new: dict, name: str = "config") -> list[str]:
    """Fields whose values differ between two `to_dict` results, free fields left out."""
    found = []
    for key in sorted({*old, *new} - set(FREE_FIELDS)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.{key}")
        elif a != b:
            found.append(f"{name}.{key}: {a!r} there, {b!r} here")
    return found
