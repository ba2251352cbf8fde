"""Writes directories of PyTorch weights, without PyTorch: for `transformers`, and Meta's hub kind.

Whatever the format cannot say is found first, listed, and raised before anything is written.
Tensors go through one block at a time.
"""

import json
from pathlib import Path

import numpy as np

from bltjax.conversion import hf_config, meta_config
from bltjax.conversion.from_torch import ENTROPY_MODEL_DIRECTORY
from bltjax.conversion.names import HF, META, to_published
from bltjax.conversion.safetensors_files import MAX_SHARD_BYTES, write_safetensors, write_sharded
from bltjax.conversion.weights import Advance, Weights, WeightsError, ignore_progress


def write_hf(
    weights: Weights,
    directory: Path,
    advance: Advance = ignore_progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
):
    """What `BltForCausalLM.from_pretrained` loads. Raises WeightsError before writing anything."""
    problems: list[str] = []
    tensors = _blt_tensors(weights, HF, problems) | _missing_projection(weights)
    if weights.entropy_model is not None:
        model = weights.entropy_model
        tensors |= to_published(model, weights.params["entropy_model"], HF)
    dtypes = {np.dtype(tensor.dtype).name for tensor in tensors.values()}
    config = None
    if weights.blt is not None:
        config = hf_config.write(
            weights, "float32" if "float32" in dtypes else max(dtypes), problems
        )
    if problems:
        raise WeightsError(directory, problems)
    directory.mkdir(parents=True, exist_ok=True)
    write_sharded(directory, tensors, advance, max_shard_bytes=max_shard_bytes)
    _write_json(directory / "generation_config.json", hf_config.GENERATION)
    _write_json(directory / "config.json", config)


def write_meta(weights: Weights, directory: Path, advance: Advance = ignore_progress):
    """Meta's hub layout, the entropy model in `entropy_model/` (or alone, if there is no BLT).

    Raises WeightsError before writing anything.
    """
    problems: list[str] = []
    args, entropy_args = None, None
    if weights.blt is not None:
        args = meta_config.write_blt(weights.blt, weights.patching, weights.lengths, problems)
    if weights.entropy_model is not None:
        entropy_args = meta_config.write_entropy_model(
            weights.entropy_model, weights.lengths, problems
        )
    if problems:
        raise WeightsError(directory, problems)
    if args is not None:
        tensors = to_published(weights.blt, weights.params["blt"], META)
        training = {
            "model": args,
            "entropy_model": entropy_args,
            "data": {
                "patcher_args": meta_config.write_patcher(weights.patching, problems),
                "tokenizer_args": {"name": "blt"},
            },
        }
        _write_model(directory, tensors, args, advance)
        _write_json(directory / "train_args.json", training)
    if entropy_args is not None:
        inside = directory / ENTROPY_MODEL_DIRECTORY if args is not None else directory
        tensors = to_published(weights.entropy_model, weights.params["entropy_model"], META)
        _write_model(inside, tensors, entropy_args, advance)


def _blt_tensors(weights: Weights, style: str, problems: list[str]) -> dict:
    if weights.blt is None:
        problems.append(
            "there is no byte latent transformer, only an entropy model: transformers has no class "
            "for it alone, write Meta's format"
        )
        return {}
    return to_published(weights.blt, weights.params["blt"], style)


def _missing_projection(weights: Weights) -> dict:
    """transformers multiplies with this matrix where the published model has none."""
    if weights.blt is None or weights.blt.has_decoder_projection:
        return {}
    like = weights.params["blt"]["local_decoder"]["output"]["weight"]
    width = weights.blt.local_decoder.dim
    name = "model.local_decoder.patch_embedding_projection.weight"
    return {name: np.eye(width, dtype=like.dtype)}


def _write_model(directory: Path, tensors: dict, args: dict, advance: Advance):
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors, advance)
    _write_json(directory / "config.json", {"args": args})


def _write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2) + "\n")
