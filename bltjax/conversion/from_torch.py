"""Reads directories of PyTorch weights, without PyTorch: Hugging Face's and Meta's two kinds.

    Hugging Face     config.json, model.safetensors or shards with an index, entropy model inside
    Meta, hub        config.json {"args": ...}, model.safetensors, train_args.json
    Meta, local      params.json, consolidated.pth

Meta keeps the entropy model in a directory of its own, of either kind. Nothing is loaded here
beyond a check of every value: the parameters come back as lazy arrays.
"""

import re
from pathlib import Path
from typing import Any

from bltjax.config import PatchingConfig
from bltjax.conversion import hf_config, meta_config, pickled_files, safetensors_files
from bltjax.conversion.fields import read_json
from bltjax.conversion.names import HF, META, from_published
from bltjax.conversion.weights import (
    Advance,
    Weights,
    WeightsError,
    ignore_progress,
    value_problems,
)
from bltjax.lazy import LazyArray

ENTROPY_MODEL_DIRECTORY = "entropy_model"
PATCHER = "model.patcher."  # of the entropy model's tensors in Hugging Face's files
# Tables of positions, which some checkpoints carry and everybody computes (spec 10.1).
_TABLES = re.compile(r"(.*\.)?rope\w*\.freqs_cis|freqs_cis")
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # left by data parallelism and compilation


def is_hf(config: dict) -> bool:
    """Whether a config.json is Hugging Face's."""
    return config.get("model_type") == "blt" or "encoder_config" in config


def is_meta(config: dict) -> bool:
    """Whether a config.json is Meta's, with or without its wrapper."""
    return "args" in config or "dim_global" in config or "n_layers" in config


def read_hf(directory: Path, advance: Advance = ignore_progress) -> Weights:
    """A `BltForCausalLM` directory. Raises WeightsError that lists every problem found.

    A directory whose `patch_in_forward` is false has no entropy model.
    """
    problems: list[str] = []
    settings = hf_config.read(read_json(directory / "config.json", problems), problems)
    tensors, unreadable = safetensors_files.open_sharded(directory)
    problems += unreadable
    params = {}
    if settings is not None:
        inside = {k: v for k, v in tensors.items() if k.startswith(PATCHER)}
        outside = {k: v for k, v in tensors.items() if k not in inside}
        if settings.entropy_model is None:
            outside = tensors
        else:
            params["entropy_model"], found = from_published(settings.entropy_model, inside, HF)
            problems += _not_explained(found, directory, unreadable)
        params["blt"], found = from_published(settings.blt, outside, HF)
        problems += _not_explained(found, directory, unreadable)
    problems += value_problems(tensors, advance)
    if problems:
        raise WeightsError(directory, problems)
    return Weights(
        settings.blt,
        settings.entropy_model,
        settings.patching,
        params,
        settings.lengths,
        settings.notes,
    )


def _not_explained(found: list[str], directory: Path, unreadable: list[str]) -> list[str]:
    """Problems of a model without tensors that are missing because their file cannot be read."""
    if not unreadable:
        return found
    index = read_json(directory / safetensors_files.INDEX, []).get("weight_map")
    if not isinstance(index, dict):
        return [problem for problem in found if not problem.endswith(" is missing")]
    return [problem for problem in found if problem.removesuffix(" is missing") not in index]


def read_meta(directory: Path, advance: Advance = ignore_progress) -> Weights:
    """A directory of Meta's: a BLT (with `entropy_model/` where that is there) or an entropy model.

    Raises WeightsError that lists every problem found.
    """
    problems: list[str] = []
    tensors = _meta_tensors(directory, problems, advance)
    unreadable = list(problems)
    args, training = _meta_settings(directory, problems)
    is_blt = "dim_global" in args  # unless the tensors say more: files repeat each other's settings
    if tensors:
        is_blt = any(name.startswith(("local_", "global_", "encoder_")) for name in tensors)
    if is_blt:
        weights = _meta_blt(args, training, tensors, problems)
    else:
        weights = _meta_entropy_model(training.get("entropy_model") or args, tensors, problems)
    problems = _not_explained(problems, directory, unreadable)
    problems += value_problems(tensors, advance)
    if is_blt and (directory / ENTROPY_MODEL_DIRECTORY).is_dir():
        try:
            entropy_model = read_meta(directory / ENTROPY_MODEL_DIRECTORY, advance)
            weights = weights and weights.with_entropy_model(entropy_model)
        except WeightsError as error:
            problems += [f"{ENTROPY_MODEL_DIRECTORY}/: {problem}" for problem in error.problems]
    if problems:
        raise WeightsError(directory, problems)
    return weights


def _meta_blt(args, training, tensors, problems) -> Weights | None:
    data = training.get("data")
    patcher = data.get("patcher_args") if isinstance(data, dict) else None
    patcher = {
        key: value
        for key, value in (patcher if isinstance(patcher, dict) else {}).items()
        if key in meta_config.PATCHER_FIELDS
    }
    config, patching, lengths = meta_config.read_blt(args, patcher, problems)
    if config is None:
        return None
    params, found = from_published(config, tensors, META)
    problems += found
    return Weights(config, None, patching, {"blt": params}, lengths)


def _meta_entropy_model(args, tensors, problems) -> Weights | None:
    config, lengths = meta_config.read_entropy_model(args, problems)
    if config is None:
        return None
    params, found = from_published(config, tensors, META)
    problems += found
    patching = PatchingConfig(target_patch_bytes=None)
    return Weights(None, config, patching, {"entropy_model": params}, lengths)


def _meta_settings(directory: Path, problems: list[str]) -> tuple[dict, dict]:
    """(settings of the model, all settings of the training run that made it)."""
    if (directory / "config.json").exists():
        config = read_json(directory / "config.json", problems)
        training = {}
        if (directory / "train_args.json").exists():
            training = read_json(directory / "train_args.json", problems)
            training.pop("entropy_model", None)  # config.json is about the tensors beside it
        return _object(config, "args", config, problems), training
    training = read_json(directory / "params.json", problems)
    bare = {} if "entropy_model" in training else training  # the model's settings alone
    return _object(training, "model", bare, problems), training


def _object(values: dict, key: str, default: dict, problems: list[str]) -> dict:
    found = values.get(key)
    if found is None:
        return default
    if not isinstance(found, dict):
        problems.append(f"{key}={found!r} must be an object")
        return {}
    return found


def _meta_tensors(directory: Path, problems: list[str], advance: Advance) -> dict[str, LazyArray]:
    """Tensors of either kind of directory, under their bare names."""
    pickled = sorted(directory.glob("*.pth"))
    if pickled and not list(directory.glob("*.safetensors*")):
        if len(pickled) > 1:
            names = [path.name for path in pickled]
            problems.append(f"{names}: several weight files, leave the one to be read")
            return {}
        try:
            contents = pickled_files.open_pth(pickled[0])
            problems += pickled_files.verify(pickled[0], advance)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            return {}
        if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
            contents = contents["model"]
        tensors = dict(_leaves(contents))
    else:
        tensors, unreadable = safetensors_files.open_sharded(directory)
        problems += unreadable
    bare: dict[str, LazyArray] = {}
    for name, tensor in tensors.items():
        short = _WRAPPERS.sub("", name)
        if _TABLES.fullmatch(short):
            continue
        if not hasattr(tensor, "shape"):
            problems.append(f"{name} is a {type(tensor).__name__}, must be a tensor")
        elif short in bare:
            problems.append(f"{short} is there twice, with and without a wrapper's prefix")
        else:
            bare[short] = tensor
    return bare


def _leaves(contents: Any, prefix: str = ""):
    """(dotted name, leaf) of nested dicts."""
    if isinstance(contents, dict):
        for key, value in contents.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, contents


def stored_bytes(directory: Path) -> int:
    """Size of the weight files that reading a PyTorch directory goes through."""
    kinds = ("*.safetensors", "*.pth")
    return sum(path.stat().st_size for kind in kinds for path in directory.rglob(kind))
