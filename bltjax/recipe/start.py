"""Starts a run from the weights in a directory that `bltjax.load` opens (docs/finetuning.md).

Shapes, patching rule and threshold are those of the source. A setting that is left at its default
is taken from it, another one must agree. The optimizer is fresh. The settings go into config.json,
a digest of what was read into start.json, and the parameters into a checkpoint before the first
step: a run that goes on reads the source no more.
"""

import dataclasses
from collections.abc import Callable

import jax

from bltjax.checkpoints import formats, placing
from bltjax.checkpoints.demo import directory_of
from bltjax.checkpoints.fingerprints import digest
from bltjax.checkpoints.run_directory import RunDirectory, Stage
from bltjax.checkpoints.weights import Weights
from bltjax.config import PatchingConfig, RunConfig
from bltjax.config.lora import LoRAConfig
from bltjax.config.reading import DEVICE_FIELDS
from bltjax.model import functional
from bltjax.model.local_decoder import MASK
from bltjax.model.lora import overlaid, without_adapters
from bltjax.recipe.entropies import put_entropy_model
from bltjax.runtime.progress import announced
from bltjax.runtime.terminal import printable_name

MODELS = ("entropy_model", "blt")
# Settings that may be others than the source's: how a model is computed, patches at turns, and the
# blocks that a decoder learns to fill in.
FREE = (*DEVICE_FIELDS, "compute_dtype", "remat", "in_step", "turns", "diffusion_block")


def resolve(config: RunConfig, directory: RunDirectory) -> tuple[RunConfig, Weights | None]:
    """Returns the settings with those of the source filled in, and its weights, still unread.

    Without `start_from`, and where every model that starts from it has a checkpoint already, there
    are no weights. Needs a mesh to be set. Raises ValueError that lists what contradicts the
    source, or why it cannot be read.
    """
    if not config.start_from:
        return config, None
    stored = _settings_of_begun(config, directory)
    if stored is not None and all(map(directory.is_trained, _starting(stored))):
        return filled(config, stored.entropy_model, stored.blt, stored.patching), None
    weights = _read(config)
    if weights.blt is None and "blt" in config.stages:
        raise ValueError(
            f"start_from={config.start_from} has an entropy model alone, and the stage 'blt' "
            "trains another: give a directory with a BLT, or leave that stage out"
        )
    return filled(config, weights.entropy_model, weights.blt, weights.patching), weights


def with_shapes(config: RunConfig) -> RunConfig:
    """Returns the settings with those of the source filled in, of which no parameter is read.

    Needs a mesh to be set. Raises ValueError as `resolve` does.
    """
    if not config.start_from:
        return config
    weights = _read(config, values=False)
    return filled(config, weights.entropy_model, weights.blt, weights.patching)


def _read(config: RunConfig, values: bool = True) -> Weights:
    try:
        return formats.read(directory_of(config.start_from), values=values)
    except OSError as error:
        raise ValueError(f"start_from={config.start_from}: {error}") from error


def filled(config: RunConfig, entropy_model, blt, patching: PatchingConfig | None) -> RunConfig:
    """Returns a config whose models and patching are those of a source, as far as it has them.

    Raises ValueError that lists the settings that contradict it.
    """
    source = dict(entropy_model=entropy_model, blt=blt, patching=blt and patching)
    default, problems, parts = RunConfig(), [], {}
    for name, there in source.items():
        if there is not None:
            given, usual = getattr(config, name), getattr(default, name)
            parts[name] = _fill(given, usual, there, name, config.start_from, problems)
    found = dataclasses.replace(config, **parts) if not problems else config
    if not found.blt.diffusion_block:
        why = f"start_from={config.start_from} fills in no blocks, set blt.diffusion_block"
        problems += config.blt_training.diffusion.without_blocks("blt_training.diffusion", why)
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _fill(given, default, there, name: str, source: str, problems: list[str]):
    """Returns a setting, or a group of them: the given one, the source's where it is the default.

    default: the value without a config. Appends to problems what contradicts the source.
    """
    if isinstance(given, LoRAConfig):  # adapters are new, or merged in the source
        return given
    if dataclasses.is_dataclass(given):
        parts = {
            f.name: _fill(
                *(getattr(x, f.name) for x in (given, default, there)),
                f"{name}.{f.name}",
                source,
                problems,
            )
            for f in dataclasses.fields(given)
        }
        return dataclasses.replace(given, **parts)
    if given == default:
        return there
    if given != there and name.rpartition(".")[2] not in FREE:
        problems.append(
            f"{name}={given!r} contradicts start_from={source}, which has {there!r}: leave it out"
        )
    return given


def _settings_of_begun(config: RunConfig, directory: RunDirectory) -> RunConfig | None:
    """Returns the settings of the directory where it holds a run from the same source."""
    if not any(map(directory.is_trained, MODELS)):
        return None
    stored = directory.config()
    return stored if stored.start_from == config.start_from else None


def _starting(config: RunConfig) -> list[str]:
    return [name for name in MODELS if name in config.stages]


def first_params(
    config: RunConfig, directory: RunDirectory, stage: Stage, start: Weights | None
) -> Callable[[], dict] | None:
    """Returns what puts the source's parameters on the mesh; None where a model starts fresh."""
    if start is None or stage.name not in start.params:
        return None

    def read() -> dict:
        source = printable_name(config.start_from)
        there = stage.model
        if stage.name == "blt":  # the rest, which is new here, is drawn
            there = dataclasses.replace(
                without_adapters(there), diffusion_block=start.blt.diffusion_block
            )
        with announced(f"{stage.name}: reading {source}"):
            lazy = formats.cast(start, "float32").params[stage.name]
            params = placing.put_lazy(lazy, functional.abstract_params(there))
        directory.keep_start(stage.name, digest(params))
        if there == stage.model:
            return params
        if stage.name == "blt" and there.diffusion_block != stage.model.diffusion_block:
            params["local_decoder"].pop(MASK, None)  # of blocks of another length
        return overlaid(functional.added(stage.model, jax.random.key(stage.training.seed)), params)

    return read


def import_first_entropy_model(config: RunConfig, directory: RunDirectory, start: Weights):
    """Puts the source's entropy model into a run that does not train it."""
    if start.entropy_model is not None and "entropy_model" not in config.stages:
        put_entropy_model(config, directory, start.params["entropy_model"], config.start_from)
