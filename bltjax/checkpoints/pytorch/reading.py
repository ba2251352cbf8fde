"""Reads directories of PyTorch weights of Hugging Face and Meta, without PyTorch.

    Hugging Face     config.json, model.safetensors or shards with an index, entropy model inside
    Meta, hub        config.json {"args": ...}, model.safetensors, train_args.json
    Meta, local      params.json, consolidated.pth

Meta keeps the entropy model in a directory of its own, of either kind. Every value is checked, but
nothing is kept in memory: parameters are lazy arrays.
"""

import re
from pathlib import Path

from bltjax.checkpoints.lazy_arrays import LazyArray, tree_leaves
from bltjax.checkpoints.pytorch import hf_config, meta_config, pth_files, safetensors_files
from bltjax.checkpoints.pytorch.fields import read_json
from bltjax.checkpoints.pytorch.tensor_names import HF, META, from_published
from bltjax.checkpoints.weights import Weights, WeightsError, value_problems
from bltjax.runtime.progress import OnProgress

ENTROPY_MODEL_DIRECTORY = "entropy_model"
PATCHER = "model.patcher."  # prefix of the entropy model's tensors in Hugging Face's files
# Tables for rotary positions, which some checkpoints contain and nobody needs (model.md#files).
_TABLES = re.compile(r"(.*\.)?rope\w*\.freqs_cis|freqs_cis")
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # left by data parallelism and compilation


def is_hf(config: dict) -> bool:
    """Returns True for a config.json of Hugging Face's."""
    return config.get("model_type") == "blt" or "encoder_config" in config


def is_meta(config: dict) -> bool:
    """Returns True for a config.json of Meta's, with or without "args" around it."""
    return "args" in config or "dim_global" in config or "n_layers" in config


def read_hf(directory: Path, on_progress: OnProgress = None) -> Weights:
    """Reads a `BltForCausalLM` directory. Raises WeightsError that lists every problem.

    There is no entropy model where `patch_in_forward` is false.
    """
    problems: list[str] = []
    weights = hf_config.read(read_json(directory / "config.json", problems), problems)
    tensors, unreadable = safetensors_files.open_sharded(directory)
    problems += unreadable
    if weights is not None:
        parts = {"blt": tensors}
        if weights.entropy_model is not None:
            inside = {k: v for k, v in tensors.items() if k.startswith(PATCHER)}
            outside = {k: v for k, v in tensors.items() if k not in inside}
            parts = {"entropy_model": inside, "blt": outside}
        for name, part in parts.items():
            weights.params[name], found = from_published(getattr(weights, name), part, HF)
            problems += _not_explained(found, directory, unreadable)
    problems += value_problems(tensors, on_progress)
    if problems:
        raise WeightsError(directory, problems)
    return weights


def _not_explained(found: list[str], directory: Path, unreadable: list[str]) -> list[str]:
    """Drops the problems of tensors that are missing because their file cannot be read."""
    if not unreadable:
        return found
    index = read_json(directory / safetensors_files.INDEX, []).get("weight_map")
    if not isinstance(index, dict):
        return [problem for problem in found if not problem.endswith(" is missing")]
    return [problem for problem in found if problem.removesuffix(" is missing") not in index]


def read_meta(directory: Path, on_progress: OnProgress = None) -> Weights:
    """Reads a directory of Meta's: a BLT, with `entropy_model/` if it exists, or an entropy model.

    Raises WeightsError that lists every problem.
    """
    problems: list[str] = []
    tensors = _meta_tensors(directory, problems, on_progress)
    unreadable = list(problems)
    weights = _meta_settings(directory, tensors, problems)
    if weights is not None:
        name = "entropy_model" if weights.blt is None else "blt"
        weights.params[name], found = from_published(getattr(weights, name), tensors, META)
        problems += _not_explained(found, directory, unreadable)
    problems += value_problems(tensors, on_progress)
    inside = directory / ENTROPY_MODEL_DIRECTORY
    if inside.is_dir() and inside.resolve() != directory.resolve():
        weights = _with_entropy_model(weights, inside, problems, on_progress)
    if problems:
        raise WeightsError(directory, problems)
    return weights


def _with_entropy_model(
    weights, directory: Path, problems: list[str], on_progress
) -> Weights | None:
    try:
        other = read_meta(directory, on_progress)
    except WeightsError as error:
        problems += [f"{directory.name}/: {problem}" for problem in error.problems]
        return weights
    if other.entropy_model is None:
        problems.append(f"{directory.name}/ holds a BLT, must hold an entropy model: remove it")
        return weights
    return weights and weights.with_entropy_model(other)


def _meta_settings(directory: Path, tensors: dict, problems: list[str]) -> Weights | None:
    """Reads weights that have no parameters yet; None where the settings have problems."""
    before = len(problems)
    if (directory / "config.json").exists():
        config = read_json(directory / "config.json", problems)
        training = {}
        if (directory / "train_args.json").exists():
            training = read_json(directory / "train_args.json", problems)
        args, entropy_model = _object(config, "args", config, problems), {}
    else:
        training = read_json(directory / "params.json", problems)
        bare = {} if "entropy_model" in training else training  # the model's settings alone
        args = _object(training, "model", bare, problems)
        entropy_model = _object(training, "entropy_model", {}, problems)
    data = _object(training, "data", {}, problems)
    patcher_args = _object(data, "patcher_args", {}, problems)
    if len(problems) > before:
        return None
    is_blt = "dim_global" in args
    if tensors:  # which tell better: settings repeat those of other models
        is_blt = any(name.startswith(("local_", "global_", "encoder_")) for name in tensors)
    if is_blt:
        return meta_config.read_blt(args, patcher_args, problems)
    return meta_config.read_entropy_model(entropy_model or args, problems)


def _object(values: dict, key: str, default: dict, problems: list[str]) -> dict:
    found = values.get(key)
    if found is None:
        return default
    if not isinstance(found, dict):
        problems.append(f"{key}={str(found)[:60]!r} must be an object of settings")
        return {}
    return found


def _meta_tensors(
    directory: Path, problems: list[str], on_progress: OnProgress
) -> dict[str, LazyArray]:
    """Opens the tensors of either kind of directory, by name without wrappers' prefixes."""
    pickled = sorted(directory.glob("*.pth"))
    in_safetensors = (safetensors_files.SINGLE, safetensors_files.INDEX)
    if pickled and not any((directory / name).exists() for name in in_safetensors):
        if len(pickled) > 1:
            names = [path.name for path in pickled]
            problems.append(f"{names}: several weight files, leave the one to be read")
            return {}
        try:
            contents = pth_files.open_pth(pickled[0])
            problems += pth_files.verify(pickled[0], on_progress)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            return {}
        if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
            contents = contents["model"]
        tensors = [(".".join(map(str, path)), leaf) for path, leaf in tree_leaves(contents)]
    else:
        found, unreadable = safetensors_files.open_sharded(directory)
        tensors = list(found.items())
        problems += unreadable
    bare: dict[str, LazyArray] = {}
    for name, tensor in tensors:
        short = _WRAPPERS.sub("", name)
        if _TABLES.fullmatch(short):
            continue
        if not hasattr(tensor, "shape"):
            problems.append(f"{name} is a {type(tensor).__name__}, must be a tensor")
        elif short in bare:
            problems.append(f"{short} is there twice, as {name} too")
        else:
            bare[short] = tensor
    return bare
