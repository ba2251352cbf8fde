"""Low-rank adapters in files of their own, in the format and under the names of PEFT.

    adapter_config.json          rank, alpha, modules
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [r, in], lora_B [out, r]

Modules have the names of Hugging Face's port, so that PEFT opens an adapter on top of it.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bltjax.checkpoints.fingerprints import digest_of
from bltjax.checkpoints.host_fingerprints import HostFingerprint
from bltjax.checkpoints.lazy_arrays import (
    Adapted,
    Cast,
    LazyArray,
    Member,
    Stacked,
    blocks,
    insert,
    tree_leaves,
)
from bltjax.checkpoints.pytorch.fields import Fields, read_json
from bltjax.checkpoints.pytorch.safetensors_files import open_safetensors, write_safetensors
from bltjax.checkpoints.pytorch.tensor_names import HF, names_by_path
from bltjax.checkpoints.pytorch.writing import WritePlan
from bltjax.checkpoints.weights import Adapter, Weights, WeightsError, value_problems
from bltjax.config import BLTConfig
from bltjax.config.lora import LoRAConfig
from bltjax.model import functional
from bltjax.model.lora import A as DOWN
from bltjax.model.lora import B as UP
from bltjax.runtime.progress import OnProgress

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def of_run(weights: Weights, base_path: str) -> Weights:
    """Returns the weights of a run whose BLT may have adapters as one that has none."""
    if weights.blt is None or not weights.blt.lora.rank:
        return weights
    base, own = separated(weights.params["blt"])
    adapter = Adapter(weights.blt.lora, own, base_path)
    plain = dataclasses.replace(weights.blt, lora=LoRAConfig())
    return merged(weights._replace(blt=plain, params=weights.params | dict(blt=base)), adapter)


def merged(weights: Weights, adapter: Adapter) -> Weights:
    """Returns weights with an adapter added to its matrices, which are read later."""

    def added(base, own):
        if DOWN in own:
            up, down = (own[name]["weight"] for name in (UP, DOWN))
            return base | dict(weight=Adapted(base["weight"], up, down, adapter.config.scale))
        return base | {name: added(base[name], x) for name, x in own.items()}

    base = weights.params["blt"]
    params = weights.params | dict(blt=added(base, adapter.params))
    return weights._replace(params=params, adapter=adapter, base=base)


def separated(params: dict) -> tuple[dict, dict]:
    """Splits the parameters of a BLT that has adapters: without them, and they alone."""
    base, own = {}, {}
    for path, leaf in tree_leaves(params):
        insert(own if path[-2] in (DOWN, UP) else base, path, leaf)
    return base, own


def plan(weights: Weights) -> WritePlan:
    """Plans a directory with the adapter of weights alone.

    Raises WeightsError where they have none.
    """
    adapter = weights.adapter
    if adapter is None:
        problem = (
            "the source was not trained with adapters (blt.lora.rank): choose a run that was, or "
            "another format"
        )
        raise WeightsError("PEFT's format", [problem])
    files = {CONFIG: described(weights.blt, adapter, weights.base)}
    return WritePlan(tensors(weights.blt, adapter), files, {}, save=_save)


def _save(directory: Path, tensors: dict, on_progress: OnProgress = None):
    write_safetensors(directory / TENSORS, tensors, on_progress)


def tensors(config: BLTConfig, adapter: Adapter) -> dict[str, LazyArray]:
    """Returns the tensors of an adapter under the names of PEFT."""
    names, found = names_by_path(config), {}
    for (*path, kind, _), leaf in tree_leaves(adapter.params):
        name = names[(*path, "weight")]
        for i in range(leaf.shape[0]) if name.stacked else (None,):
            module = name.tensor(HF, i).removesuffix(".weight")
            part = leaf if i is None else Member(leaf, i)
            found[f"{PREFIX}{module}.{kind}.weight"] = part
    return found


def described(config: BLTConfig, adapter: Adapter, base: dict) -> dict:
    """Returns the content of adapter_config.json.

    base: the parameters without adapters, of which it holds a digest, an addition to PEFT's format.
    """
    modules = {name.removeprefix(PREFIX).rsplit(".", 2)[0] for name in tensors(config, adapter)}
    lora = adapter.config
    return dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base_path,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(modules),
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        init_lora_weights=True,
        base_digest=digest_of_matrices(base, adapter.params),
    )


def read(directory: Path, weights: Weights) -> Adapter:
    """Reads an adapter for the BLT of weights. Raises WeightsError that lists every problem.

    Matrices of a stack that have none get zeros.
    """
    problems: list[str] = []
    said = read_json(directory / CONFIG, problems)
    if problems:
        raise WeightsError(directory, problems)
    fields = Fields(CONFIG, said)
    rank = fields.take("r", int, least=1)
    alpha = fields.take("lora_alpha", float)
    problems += fields.problems + list(_unknown_kinds(said))
    if weights.blt is None:
        problems.append("adapters are for a BLT, and the base has an entropy model alone")
    try:
        found = open_safetensors(directory / TENSORS)
    except (OSError, ValueError) as error:
        problems.append(str(error))
    if problems:
        raise WeightsError(directory, problems)
    params, wrong = _placed(weights.blt, found, rank)
    problems += wrong + value_problems(found)
    base, digest = said.get("base_model_name_or_path"), said.get("base_digest")
    if not problems and digest not in (None, digest_of_matrices(weights.params["blt"], params)):
        problems.append(
            f"it was trained on other weights, those of {base}: give that directory as the base"
        )
    if problems:
        raise WeightsError(directory, problems)
    return Adapter(LoRAConfig(rank=rank, alpha=alpha), params, base)


def _unknown_kinds(said: dict) -> Iterator[str]:
    """Yields what an adapter has that these are not: other kinds, biases, scales of their own."""
    usual = dict(peft_type="LORA", bias="none", use_dora=False, use_rslora=False, alpha_pattern={})
    usual |= dict(rank_pattern={}, modules_to_save=None, fan_in_fan_out=False)
    for name, value in usual.items():
        if said.get(name, value) not in (value, None):
            yield f"{CONFIG} has {name}={said[name]!r}: only {value!r} can be read"


def _placed(config: BLTConfig, found: dict[str, LazyArray], rank: int) -> tuple[dict, list[str]]:
    """Returns tensors of PEFT's names as nested adapters, and the problems with them."""
    shapes = {path: leaf.shape for path, leaf in tree_leaves(functional.abstract_params(config))}
    left, params, problems = dict(found), {}, []
    for path, name in names_by_path(config).items():
        shape = shapes.get(path, ())
        if len(shape) != 2 + name.stacked:  # no matrix, or not in this model
            continue
        layers = range(shape[0]) if name.stacked else [None]
        modules = [name.tensor(HF, i).removesuffix(".weight") for i in layers]
        wanted = {DOWN: (rank, shape[-1]), UP: (shape[-2], rank)}
        halves = {kind: _half(left, modules, kind, wanted[kind], problems) for kind in wanted}
        if all(part is None for parts in halves.values() for part in parts):
            continue
        problems += [
            f"{module} has one of {DOWN} and {UP}, and not the other"
            for module, *both in zip(modules, *halves.values(), strict=True)
            if both.count(None) == 1
        ]
        for kind, parts in halves.items():
            filled = [np.zeros(wanted[kind], np.float32) if x is None else x for x in parts]
            leaf = Stacked(filled) if name.stacked else filled[0]
            insert(params, (*path[:-1], kind, "weight"), leaf)
    problems += [f"{name} has no place in the base: it is for another model" for name in left]
    return params, problems


def _half(
    left: dict[str, LazyArray], modules: list[str], kind: str, wanted: tuple, problems: list[str]
) -> list[LazyArray | None]:
    """Takes one matrix of the adapter of each module, float32; None where a module has none."""
    parts: list[LazyArray | None] = []
    for module in modules:
        key = f"{PREFIX}{module}.{kind}.weight"
        part = left.pop(key, None)
        if part is not None and tuple(part.shape) != wanted:
            problems.append(f"{key} has shape {list(part.shape)}, the base {list(wanted)}")
        parts.append(part if part is None else Cast(part, np.float32))
    return parts


def digest_of_matrices(base: dict, own: dict) -> str:
    """Returns a digest of the matrices of nested parameters that have adapters, in float32.

    Reads them once, piece by piece. (Other parameters may differ between formats: the rows of hash
    tables that nothing reads.)
    """
    numbers = {}
    for path in sorted(path[:-2] for path, _ in tree_leaves(own) if path[-2] == DOWN):
        leaf = functools.reduce(lambda tree, key: tree[key], (*path, "weight"), base)
        total, whole = HostFingerprint(), Cast(leaf, np.float32)
        for index in blocks(whole):
            total.add(whole[index])
        numbers[".".join(path)] = total.value
    return digest_of(numbers)
