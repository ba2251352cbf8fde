"""Formats of directories of weights: finds out which one it is, reads it, plans writing.

bltjax's own holds `model.json` (configs, patching rule) and `weights/`, an Orbax checkpoint. The
working directory of a training run opens too, with the newest checkpoint of each stage.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bltjax.checkpoints import adapters
from bltjax.checkpoints.checksums import CHECKSUMS, checksum_problems
from bltjax.checkpoints.demo import MODEL, existing, way_past
from bltjax.checkpoints.lazy_arrays import Cast
from bltjax.checkpoints.orbax_weights import open_weights, save_weights
from bltjax.checkpoints.pytorch import reading, writing
from bltjax.checkpoints.pytorch.fields import Fields, read_json
from bltjax.checkpoints.pytorch.llama_config import KINDS
from bltjax.checkpoints.pytorch.writing import WritePlan
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.checkpoints.training_state import CheckpointError
from bltjax.checkpoints.weights import (
    Lengths,
    Weights,
    WeightsError,
    flat,
    shape_problems,
    shapes,
    value_problems,
)
from bltjax.config import (
    BLTConfig,
    EntropyModelConfig,
    PatchingConfig,
    RunConfig,
    from_config_dict,
    to_dict,
    to_model_dict,
)
from bltjax.config.chat import ChatConfig
from bltjax.config.model import DTYPES
from bltjax.model import functional
from bltjax.model.local_decoder import MASK
from bltjax.patching.boundaries import check_rule, needs_entropies
from bltjax.runtime import buckets
from bltjax.runtime.files import UNFINISHED
from bltjax.runtime.object_cache import on_disk
from bltjax.runtime.paths import as_path, is_remote
from bltjax.runtime.plain_files import dangling_links, irregular_files
from bltjax.runtime.progress import OnProgress

VERSION = 1  # of model.json
WEIGHTS = "weights"
BLTJAX, RUN, HF, META = "bltjax", "run", "hf", "meta"
PEFT = "peft"  # an adapter alone, which is only written
# Names in a directory that are never taken for absent where they are links to nothing.
_READ = (
    r"(model|config|params|train_args|patching)\.json|weights|blt|entropy_model"
    r"|.*\.(pth|safetensors|safetensors\.index\.json)"
)


def detect(directory: Path) -> str:
    """Returns the format of a directory: one of BLTJAX, RUN (of training), HF and META.

    Raises FileNotFoundError without a directory, WeightsError where it is none of these.
    """
    directory = existing(as_path(directory))
    if (directory / UNFINISHED).exists():
        raise WeightsError(directory, ["it is what an interrupted conversion left: convert again"])
    if (directory / MODEL).exists():
        return BLTJAX
    problems: list[str] = []
    config = read_json(directory / "config.json", problems)
    if "stages" in (config.get("config") or ()):
        return RUN
    if reading.is_hf(config):
        return HF
    if reading.is_meta(config) or (directory / "params.json").exists():
        return META
    if (kind := config.get("model_type")) in tuple(KINDS):
        problem = f"it is a tokenized model ({kind}): make a byte model of it with bltjax byteify"
        raise WeightsError(directory, [problem])
    if not problems:
        problems = [
            "config.json is neither Hugging Face's (model_type 'blt'), nor Meta's (args), nor that "
            "of a training run"
        ]
    if problems == ["config.json is missing"]:
        problem = f"it holds none of config.json, params.json and {MODEL}: give one that does"
        problems = [f"{problem}{way_past(directory)}"]
    raise WeightsError(directory, problems)


def read(
    directory: str | os.PathLike,
    entropy_model: str | os.PathLike | None = None,
    on_progress: OnProgress = None,
    verify: bool = True,
    adapter: str | os.PathLike | None = None,
    values: bool = True,
) -> Weights:
    """Reads the model in a directory of any format, its parameters lazy; needs a mesh to be set.

    entropy_model: a directory whose entropy model is taken. verify: compare the files with
    checksums.json, where there is one. adapter: a directory with an adapter, which is added to its
    matrices. values: read every value once, and check it; else only settings and shapes.

    Raises WeightsError, which lists every problem found, FileNotFoundError, or CheckpointError for
    a damaged checkpoint.
    """
    problems: list[str] = []
    weights = _read_one(directory, problems, on_progress, verify, values)
    if entropy_model is not None:
        in_other: list[str] = []
        other = _read_one(entropy_model, in_other, on_progress, verify, values)
        problems += [f"{entropy_model}: {problem}" for problem in in_other]
        if other is not None and other.entropy_model is None:
            problems.append(f"{entropy_model} has no entropy model: give a directory that has one")
        elif other is not None and weights is not None:
            weights = _with_another(weights, other, entropy_model)
    if problems or weights is None:
        raise WeightsError(directory, problems)
    if adapter is not None:
        weights = adapters.merged(weights, adapters.read(on_disk(as_path(adapter)), weights))
    return weights._replace(notes=(*weights.notes, *_notes_on_half(weights)))


def _with_another(weights: Weights, other: Weights, directory) -> Weights:
    """Returns weights with the entropy model of another directory, and a note on what it means."""
    notes = [f"{directory}: {note}" for note in other.notes]
    if weights.entropy_model is not None:
        notes.append(
            f"the entropy model is that of {directory}, instead of its own, and the threshold "
            f"stays {weights.patching.threshold:.4f} nats"
        )
    return weights.with_entropy_model(other._replace(notes=tuple(notes)))


def _notes_on_half(weights: Weights) -> tuple[str, ...]:
    if weights.blt is None or weights.entropy_model or not needs_entropies(weights.patching):
        return ()
    return (
        "there is no entropy model, and patches start where it is uncertain: without one nothing "
        "can be generated or scored; name a directory that has one with --entropy_model=DIR",
    )


def _read_one(
    directory: str | os.PathLike,
    problems: list[str],
    on_progress: OnProgress,
    verify: bool,
    values: bool,
) -> Weights | None:
    directory = as_path(directory)
    readers = {BLTJAX: _read_bltjax, RUN: _read_run, HF: reading.read_hf, META: reading.read_meta}
    try:
        if directory.is_dir() and (dangling := dangling_links(directory, _READ)):
            raise WeightsError(directory, dangling)
        if is_remote(directory) and detect(directory) == RUN:  # of which a host reads what it needs
            return _read_run(directory, on_progress, values)
        directory = on_disk(directory)
        if verify and values and (damaged := checksum_problems(directory, on_progress)):
            raise WeightsError(directory, damaged)
        return readers[detect(directory)](directory, on_progress, values)
    except WeightsError as error:
        problems += error.problems
        return None


def stored_bytes(directory: Path) -> int:
    """Returns about how many bytes `read` goes through, for progress bars."""
    if is_remote(directory):
        return buckets.bytes_below(directory)
    weights = ("*.safetensors", "*.pth") if detect(directory) in (HF, META) else ("*",)
    files = [path for pattern in weights for path in directory.rglob(pattern)]
    times = 2 if (directory / CHECKSUMS).exists() else 1  # once for the checksums
    return times * sum(os.path.getsize(path) for path in files if path.is_file())


def left_behind(directory: Path) -> list[str]:
    """Returns a note on the files of published weights that are not part of what `read` reads."""
    found = detect(directory)
    if found == RUN:
        return []
    local = on_disk(directory)
    read = {MODEL, WEIGHTS} if found == BLTJAX else reading.files(local, found == META)
    there = {path.name for path in local.iterdir() if not path.name.startswith(".")}
    others = sorted(there - read - {CHECKSUMS})
    if not others:
        return []
    return [f"these files of the source are neither read nor copied: {', '.join(others)}"]


def plan(weights: Weights, format: str) -> WritePlan:
    """Plans a directory in a format. Raises WeightsError for what the format cannot express."""
    planners = {BLTJAX: _plan_bltjax, HF: writing.plan_hf, META: writing.plan_meta}
    return (planners | {PEFT: adapters.plan})[format](weights)


def _plan_bltjax(weights: Weights) -> WritePlan:
    described = dict(
        format=VERSION,
        bltjax=version("bltjax"),
        blt=to_model_dict(weights.blt) if weights.blt else None,
        entropy_model=to_model_dict(weights.entropy_model) if weights.entropy_model else None,
        patching=to_model_dict(weights.patching),
        lengths=weights.lengths._asdict(),
    )
    if weights.chat is not None:
        described["chat"] = dataclasses.asdict(weights.chat)

    def save(directory: Path, _, on_progress: OnProgress):
        save_weights(directory / WEIGHTS, weights.params, on_progress)

    return WritePlan(flat(weights.params), {MODEL: described}, {}, save=save)


def check_dtype(dtype: str | None):
    """Raises ValueError for a dtype that parameters cannot be cast to."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} must be one of {DTYPES}, or None to keep what is there")


def cast(weights: Weights, dtype: str | None) -> Weights:
    """Returns the weights in "float32" or "bfloat16" (rounded to nearest); None keeps them."""
    if dtype is None:
        return weights
    wanted = np.dtype(dtype)

    def convert(tree):
        if isinstance(tree, dict):
            return {key: convert(value) for key, value in tree.items()}
        return tree if np.dtype(tree.dtype) == wanted else Cast(tree, wanted)

    return weights._replace(params=convert(weights.params))


def _read_bltjax(directory: Path, on_progress: OnProgress, values: bool) -> Weights:
    problems: list[str] = []
    described = read_json(directory / MODEL, problems)
    if problems:
        raise WeightsError(directory, problems)
    version = described.pop("format", None)
    described.pop("bltjax", None)
    if version != VERSION:
        problems.append(
            f"{MODEL} has format {version!r}, this bltjax reads {VERSION}: use the bltjax that "
            "wrote it, or a newer one"
        )
    names = dict(
        blt=BLTConfig, entropy_model=EntropyModelConfig, patching=PatchingConfig, chat=ChatConfig
    )
    parts = {name: described.pop(name, None) for name in names}
    blt, entropy_model, patching, chat = (
        _config(cls, parts[name], name, problems) for name, cls in names.items()
    )
    fields = Fields(MODEL, {"lengths": described.pop("lengths", {})})
    lengths = Lengths(*(fields.take(f"lengths.{f}", int, least=1) for f in Lengths._fields))
    problems += fields.problems
    problems += [f"{MODEL}: {key} is a field that nobody knows: remove it" for key in described]
    if not problems and blt is None and entropy_model is None:
        problems.append(f"{MODEL} has neither blt nor entropy_model")
    if problems := problems + irregular_files(directory / WEIGHTS):
        raise WeightsError(directory, problems)
    params = open_weights(directory / WEIGHTS)
    _check(directory, dict(blt=blt, entropy_model=entropy_model), params, on_progress, values)
    patching = patching or PatchingConfig(target_patch_bytes=None)
    read = dict(blt=blt, entropy_model=entropy_model, patching=blt and patching)
    assumed = [
        setting
        for name, config in read.items()
        if config is not None
        for setting in _not_said(parts[name] or {}, to_model_dict(config), name)
    ]
    told = f"{MODEL} does not say, so it is assumed: {', '.join(assumed)}"
    notes = (told,) if assumed else ()
    return Weights(blt, entropy_model, patching, params, lengths, notes, chat=chat)


def _not_said(values: dict, whole: dict, name: str) -> Iterator[str]:
    """Yields the settings of the whole group `name` that are not among the values of a file."""
    for key, value in whole.items():
        if key not in values:
            yield f"{name}.{key}={json.dumps(value)}"
        elif isinstance(value, dict):
            yield from _not_said(values[key], value, f"{name}.{key}")


def _config(cls, values, name: str, problems: list[str]):
    """Returns the dataclass that a part of model.json describes; None where absent or wrong."""
    if values is None:
        return None
    if not isinstance(values, dict):
        problems.append(f"{MODEL}: {name}={str(values)[:60]!r} must be an object of settings")
        return None
    try:
        config = from_config_dict(cls, values, name)
        found = config.problems(name)
        if isinstance(config, PatchingConfig):
            check_rule(config)
    except (ValueError, TypeError, OverflowError) as error:
        found = [str(error)]
    problems += [f"{MODEL}: {problem}" for problem in found]
    return None if found else config


def _read_run(path: Path, on_progress: OnProgress, values: bool) -> Weights:
    directory = RunDirectory(path)
    config = directory.config()
    patching, notes = _run_patching(directory, config)
    names = [name for name in ("blt", "entropy_model") if directory.is_trained(name)]
    if not names and directory.is_trained("token_model"):
        problem = "it is a run of a token model, which no other format has: convert runs of a BLT"
        raise WeightsError(path, [problem])
    if not names:
        raise WeightsError(path, ["it is a run without a checkpoint yet: train it first"])
    stages = [directory.stage(config, name) for name in names]
    if irregular := [p for stage in stages for p in irregular_files(stage.directory)]:
        raise WeightsError(path, irregular)
    params = {stage.name: stage.lazy_params() for stage in stages}
    configs = {stage.name: stage.portable_model for stage in stages}
    if stages[0].name == "blt" and (threshold := directory.threshold()) is not None:
        stages[0].check_data(threshold=threshold)
    _check(path, configs, params, on_progress, values)
    weights = Weights(
        configs.get("blt"),
        configs.get("entropy_model"),
        patching,
        params,
        Lengths(row_bytes=stages[0].training.row_bytes or directory.row_bytes()),
        notes if "blt" in names else _without_blt(config),
        chat=_chat(config) if "blt" in names else None,
        run=dict(config=to_dict(config), result=directory.read_result()),
    )
    return adapters.of_run(weights, config.start_from)


def _chat(config: RunConfig) -> ChatConfig | None:
    """Returns how turns look in a run; None of one that knows no conversations."""
    data = config.data
    said = config.patching.turns or data.chat != ChatConfig()
    return data.chat if said or any(s.kind == "chat" for s in data.sources) else None


def _without_blt(config: RunConfig) -> tuple[str, ...]:
    if "blt" not in config.stages:
        return ()
    return ("the BLT has no checkpoint yet: this is the entropy model alone",)


def _run_patching(
    directory: RunDirectory, config: RunConfig
) -> tuple[PatchingConfig, tuple[str, ...]]:
    """Returns where the patches of a run start, and notes on that."""
    patching = dataclasses.replace(config.patching, target_patch_bytes=None)
    if not needs_entropies(patching) or config.patching.target_patch_bytes is None:
        return patching, ()
    threshold = directory.threshold()
    if threshold is None:
        note = f"no threshold is calibrated yet, {patching.threshold:.4f} nats is used"
        return patching, (note,)
    return dataclasses.replace(patching, threshold=threshold), ()


def _check(directory: Path, configs: dict, params: dict, on_progress: OnProgress, values: bool):
    """Raises WeightsError unless parameters are what their configs say, and finite (`values`)."""
    expected = {name: functional.abstract_params(c) for name, c in configs.items() if c is not None}
    problems = shape_problems(shapes(flat(params)), shapes(flat(expected)))
    if any(MASK in problem for problem in problems):
        problems.append(
            f"{MASK} has a vector for each distance in a block, and one for all in earlier "
            "versions: train those blocks again"
        )
    try:
        problems += value_problems(flat(params), on_progress) if values else []
    except CheckpointError as error:
        problems.append(str(error))
    if problems:
        raise WeightsError(directory, problems)
