"""Writes directories of PyTorch weights, for `transformers` or in Meta's layout, without PyTorch.

A directory is planned first, and everything that its format cannot express is raised in one error
before anything is written. Then tensors are copied block by block.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bltjax.checkpoints.lazy_arrays import LazyArray, tree_leaves
from bltjax.checkpoints.pytorch import hf_config, hf_tokenizer, meta_config
from bltjax.checkpoints.pytorch.model_card import card
from bltjax.checkpoints.pytorch.reading import ENTROPY_MODEL_DIRECTORY
from bltjax.checkpoints.pytorch.safetensors_files import write_sharded
from bltjax.checkpoints.pytorch.tensor_names import HF, META, to_published
from bltjax.checkpoints.weights import Weights, WeightsError
from bltjax.config import BLTConfig
from bltjax.runtime.files import write_json
from bltjax.runtime.progress import OnProgress

_in_one_file = functools.partial(write_sharded, max_shard_bytes=math.inf)


class WritePlan(NamedTuple):
    """Content of a directory that is to be written."""

    tensors: dict[str, LazyArray]  # by name
    files: dict[str, dict | str]  # JSON, or text, by file name
    inside: dict[str, "WritePlan"]  # directories
    notes: tuple[str, ...] = ()
    save: Callable[[Path, dict, OnProgress], None] = write_sharded  # writes the tensors

    def write(self, directory: Path, on_progress: OnProgress = None):
        """Writes the directory. Raises OSError where the disk is full."""
        self.save(directory, self.tensors, on_progress)
        for name, plan in self.inside.items():
            plan.write(directory / name, on_progress)
        for name, value in self.files.items():
            if isinstance(value, str):
                (directory / name).write_text(value, encoding="utf-8")
            else:
                write_json(directory / name, value)


def plan_hf(weights: Weights) -> WritePlan:
    """Plans a directory for `BltForCausalLM.from_pretrained`.

    Raises WeightsError for what the format cannot express.
    """
    if weights.blt is None:
        raise WeightsError(
            "Hugging Face's format",
            ["there is only an entropy model, which transformers has no class for: choose meta"],
        )
    problems: list[str] = []
    dtypes = {np.dtype(leaf.dtype).name for _, leaf in tree_leaves(weights.params)}
    dtype = "float32" if "float32" in dtypes else max(dtypes)
    config = hf_config.write(weights, dtype, problems)
    if problems:  # before tensors are named, of which some may have none there
        raise WeightsError("Hugging Face's format", problems)
    tensors = to_published(weights.blt, weights.params["blt"], HF) | _projection(weights)
    if weights.entropy_model is not None:
        tensors |= to_published(weights.entropy_model, weights.params["entropy_model"], HF)
    num_parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    files = {
        "README.md": card(weights, num_parameters),
        "generation_config.json": hf_config.GENERATION,
        **hf_tokenizer.files(weights.chat),
        "config.json": config,
    }
    notes = hf_config.notes(weights.blt, weights.patching) + _left_out(weights.blt)
    return WritePlan(tensors, files, {}, notes)


def plan_meta(weights: Weights) -> WritePlan:
    """Plans a directory in Meta's hub layout, with the entropy model in `entropy_model/`.

    Without a BLT the directory is that of the entropy model. Raises WeightsError for what the
    format cannot express.
    """
    problems: list[str] = []
    of_entropy_model, training = None, {}
    if weights.entropy_model is not None:
        of_entropy_model = meta_config.write_entropy_model(
            weights.entropy_model, weights.lengths, problems
        )
    if weights.blt is not None:
        training = {
            "model": meta_config.write_blt(weights, problems),
            "entropy_model": of_entropy_model,
            "data": {
                "patcher_args": meta_config.write_patcher(weights.patching, problems),
                "tokenizer_args": {"name": "blt"},
            },
        }
    if problems:  # before tensors are named, of which some may have none there
        raise WeightsError("Meta's format", problems)
    entropy_model = None
    if weights.entropy_model is not None:
        tensors = to_published(weights.entropy_model, weights.params["entropy_model"], META)
        files = {"config.json": {"args": of_entropy_model}}
        entropy_model = WritePlan(tensors, files, {}, save=_in_one_file)
    if weights.blt is None:
        return entropy_model
    return WritePlan(
        to_published(weights.blt, weights.params["blt"], META),
        {"train_args.json": training, "config.json": {"args": training["model"]}},
        {} if entropy_model is None else {ENTROPY_MODEL_DIRECTORY: entropy_model},
        meta_config.notes(weights.patching) + _left_out(weights.blt),
        _in_one_file,
    )


def _left_out(blt: BLTConfig) -> tuple[str, ...]:
    """Returns a note on what of a model has no place in published formats."""
    if not blt.diffusion_block:
        return ()
    return (
        f"diffusion_block={blt.diffusion_block}: published formats know no blocks, so the "
        "embedding of masked bytes is left out; next bytes are predicted as before",
    )


def _projection(weights: Weights) -> dict:
    """Returns the identity for a matrix that only transformers has, or nothing."""
    if weights.blt.has_decoder_projection:
        return {}
    like = weights.params["blt"]["local_decoder"]["output"]["weight"]
    width = weights.blt.local_decoder.dim
    name = "model.local_decoder.patch_embedding_projection.weight"
    return {name: np.eye(width, dtype=like.dtype)}
