"""Reads directories of PyTorch weights of Hugging Face and Meta, without PyTorch.

    Hugging Face     config.json, model.safetensors or shards with an index, entropy model inside
    Meta, hub        config.json {"args": ...}, model.safetensors, train_args.json
    Meta, local      params.json, consolidated.pth

Meta keeps the entropy model in a directory of its own, of either kind. Every value is checked, but
nothing is kept in memory: parameters are lazy arrays.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bltjax.checkpoints.lazy_arrays import LazyArray, tree_leaves
from bltjax.checkpoints.pytorch import hf_config, meta_config, pth_files, safetensors_files
from bltjax.checkpoints.pytorch.fields import read_json
from bltjax.checkpoints.pytorch.tensor_names import (
    HF,
    META,
    expected_shapes,
    from_published,
    without_wrappers,
)
from bltjax.checkpoints.weights import Weights, WeightsError, dtype_problems, value_problems
from bltjax.runtime.progress import OnProgress

ENTROPY_MODEL_DIRECTORY = "entropy_model"
PATCHER = "model.patcher."  # prefix of the entropy model's tensors in Hugging Face's files
# Tables for rotary positions, which some checkpoints contain and nobody needs (model.md#files).
_TABLES = re.compile(r"(.*\.)?rope\w*\.freqs_cis|freqs_cis|(.*\.)?rotary_emb\.\w*inv_freq")


def is_hf(config: dict) -> bool:
    """Returns True for a config.json of Hugging Face's."""
    return config.get("model_type") == "blt" or "encoder_config" in config


def is_meta(config: dict) -> bool:
    """Returns True for a config.json of Meta's, with or without "args" around it."""
    return "args" in config or "dim_global" in config or "n_layers" in config


def read_hf(directory: Path, on_progress: OnProgress = None, values: bool = True) -> Weights:
    """Reads a `BltForCausalLM` directory. Raises WeightsError that lists every problem.

    There is no entropy model where `patch_in_forward` is false. values: read and check them too.
    """
    problems: list[str] = []
    notes: list[str] = []
    config = read_json(directory / "config.json", problems)
    weights = hf_config.read(config, problems)
    found, unreadable = safetensors_files.open_sharded(directory)
    problems += unreadable
    tensors = by_published_name(found.items(), HF, problems, notes)
    expected = None
    if weights is not None:
        notes += _dtype_notes(config, tensors)
        parts, expected = {"blt": tensors}, {}
        if weights.entropy_model is not None:
            inside = {k: v for k, v in tensors.items() if k.startswith(PATCHER)}
            outside = {k: v for k, v in tensors.items() if k not in inside}
            parts = {"entropy_model": inside, "blt": outside}
        for name, part in parts.items():
            model = getattr(weights, name)
            weights.params[name], wrong = from_published(model, part, HF)
            problems += not_explained(wrong, directory, unreadable, HF)
            expected |= expected_shapes(model, HF, len(part))
        weights = weights._replace(notes=(*weights.notes, *notes))
    problems += in_tensors(tensors, expected, on_progress, values)
    if problems or weights is None:
        raise WeightsError(directory, problems)
    return weights


def files(directory: Path, is_meta: bool) -> set[str]:
    """Returns the names of what is read of a directory of either publisher."""
    config = (directory / "config.json").exists()
    settings = {"config.json" if config else "params.json"}
    if is_meta:
        settings |= {"train_args.json", ENTROPY_MODEL_DIRECTORY}
    index = directory / safetensors_files.INDEX
    if index.exists():
        return {*settings, index.name, *safetensors_files.read_index(index).values()}
    if (directory / safetensors_files.SINGLE).exists():
        return {*settings, safetensors_files.SINGLE}
    return {*settings, *(path.name for path in directory.glob("*.pth"))}


def _dtype_notes(config: dict, tensors: dict[str, LazyArray]) -> list[str]:
    """Returns a note where config.json has no dtype, or another than the tensors."""
    said = config.get("dtype") or config.get("torch_dtype")
    there = sorted({np.dtype(tensor.dtype).name for tensor in tensors.values()})
    if said is None:
        return [f"config.json does not say dtype: the tensors keep theirs, {' and '.join(there)}"]
    if there and said not in there:
        return [f"config.json says dtype {said!r}: the tensors are {' and '.join(there)}, kept"]
    return []


def in_tensors(
    tensors: dict[str, LazyArray],
    expected: dict[str, tuple] | None,
    on_progress: OnProgress,
    values: bool,
) -> list[str]:
    """Returns the problems inside of tensors: of dtypes, and of the values that it reads.

    Tensors that have no place in the model are not read, they may be of any size. expected: shapes,
    None where they are not known.
    """
    if not values:
        return dtype_problems(tensors)
    placed = {
        name: tensor
        for name, tensor in tensors.items()
        if expected is None or expected.get(name) == tuple(tensor.shape)
    }
    others = {name: tensor for name, tensor in tensors.items() if name not in placed}
    return dtype_problems(others) + value_problems(placed, on_progress)


def not_explained(
    wrong: list[str], directory: Path, unreadable: list[str], style: str
) -> list[str]:
    """Drops the problems of tensors that are missing because their file cannot be read."""
    if not unreadable:
        return wrong
    index = read_json(directory / safetensors_files.INDEX, []).get("weight_map")
    if not isinstance(index, dict):
        return [problem for problem in wrong if not problem.endswith(" is missing")]
    named = {without_wrappers(name, style) for name in index}
    return [problem for problem in wrong if problem.removesuffix(" is missing") not in named]


def read_meta(directory: Path, on_progress: OnProgress = None, values: bool = True) -> Weights:
    """Reads a directory of Meta's: a BLT, with `entropy_model/` if it exists, or an entropy model.

    Raises WeightsError that lists every problem. values: read and check them too.
    """
    problems: list[str] = []
    notes: list[str] = []
    found = _meta_tensors(directory, problems, on_progress, values)
    unreadable = list(problems)
    tensors = by_published_name(found, META, problems, notes)
    weights = _meta_settings(directory, tensors, problems)
    expected = None
    if weights is not None:
        name = "entropy_model" if weights.blt is None else "blt"
        model = getattr(weights, name)
        weights.params[name], wrong = from_published(model, tensors, META)
        problems += not_explained(wrong, directory, unreadable, META)
        expected = expected_shapes(model, META, len(tensors))
        weights = weights._replace(notes=(*weights.notes, *notes))
    problems += in_tensors(tensors, expected, on_progress, values)
    inside = directory / ENTROPY_MODEL_DIRECTORY
    if inside.is_dir() and inside.resolve() != directory.resolve():
        weights = _with_entropy_model(weights, inside, problems, on_progress, values)
    if problems or weights is None:
        raise WeightsError(directory, problems)
    return weights


def _with_entropy_model(
    weights, directory: Path, problems: list[str], on_progress, values: bool
) -> Weights | None:
    try:
        other = read_meta(directory, on_progress, values)
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
        training, source = {}, "there is no train_args.json"
        if (directory / "train_args.json").exists():
            training = read_json(directory / "train_args.json", problems)
            source = "train_args.json has no data.patcher_args"
        args, entropy_model = _object(config, "args", config, problems), {}
    else:
        training = read_json(directory / "params.json", problems)
        source = "params.json has no data.patcher_args"
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
        weights = meta_config.read_blt(args, patcher_args, problems)
        if weights is None or patcher_args:
            return weights
        note = f"{source}: where patches start is taken from the settings of the model"
        return weights._replace(notes=(note, *weights.notes))
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
    directory: Path, problems: list[str], on_progress: OnProgress, values: bool
) -> list[tuple[str, Any]]:
    """Opens the tensors of either kind of directory, with their names."""
    pickled = sorted(directory.glob("*.pth"))
    in_safetensors = (safetensors_files.SINGLE, safetensors_files.INDEX)
    if not pickled or any((directory / name).exists() for name in in_safetensors):
        found, unreadable = safetensors_files.open_sharded(directory)
        problems += unreadable
        return list(found.items())
    if len(pickled) > 1:
        names = [path.name for path in pickled]
        problems.append(f"{names}: several weight files, leave the one to be read")
        return []
    try:
        contents = pth_files.open_pth(pickled[0])
        problems += pth_files.verify(pickled[0], on_progress) if values else []
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return []
    if not isinstance(contents, dict):
        problems.append(f"{pickled[0].name} has no tensors by name: save model.state_dict()")
        return []
    if isinstance(contents.get("model"), dict):
        contents = contents["model"]
    return [(".".join(map(str, path)), leaf) for path, leaf in tree_leaves(contents)]


def by_published_name(
    tensors: Iterable[tuple[str, Any]], style: str, problems: list[str], notes: list[str]
) -> dict[str, LazyArray]:
    """Returns tensors by name without wrappers' prefixes; tables of positions are left out."""
    bare: dict[str, LazyArray] = {}
    tables = []
    for name, tensor in tensors:
        short = without_wrappers(name, style)
        if _TABLES.fullmatch(short):
            tables.append(name)
        elif not hasattr(tensor, "shape"):
            problems.append(f"{name} is a {type(tensor).__name__}, must be a tensor")
        elif short in bare:
            problems.append(f"{short} is there twice, as {name} too")
        else:
            bare[short] = tensor
    if tables:
        more = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
        notes.append(f"{tables[0]}{more}: tables of positions are not read, rope_theta gives them")
    return bare
