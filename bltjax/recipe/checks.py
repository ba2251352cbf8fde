"""Checks a run before it writes anything: stages, sizes, mesh, text, working directory."""

import difflib
import os
from typing import NamedTuple

import jax

from bltjax import sharding
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.checkpoints.weights import Weights
from bltjax.config import RunConfig
from bltjax.data.records.store import (
    ENTROPIES,
    NoRecords,
    Unfinished,
    open_store,
    without_entropies,
)
from bltjax.data.sources.units import list_units, refuse_without_document
from bltjax.model import functional
from bltjax.model.lora import matches
from bltjax.patching.boundaries import check_rule, needs_entropies, rule_of
from bltjax.recipe.start import resolve
from bltjax.recipe.teacher import check_teacher
from bltjax.runtime import object_cache
from bltjax.runtime.paths import absolute


class CheckedRun(NamedTuple):
    """A run that may begin: its working directory is claimed."""

    config: RunConfig
    directory: RunDirectory
    mesh: jax.sharding.Mesh
    start: Weights | None = None  # that models begin with, see `recipe.start`


def check_run(config: RunConfig, workdir: str | os.PathLike, needs_models: bool = True):
    """Checks everything a run needs, claims its working directory and returns a CheckedRun.

    needs_models: whether models that the stages use and do not train must be there. Raises
    ValueError or OSError that names the value and the remedy.
    """
    object_cache.use(object_cache.Settings(config.data.cache, config.data.cache_bytes))
    directory = RunDirectory(absolute(workdir))
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        config, start = resolve(config, directory)
        check_adapters(config)
        check_teacher(config)
    check_rule(config.patching)
    check_sources(config, directory)
    if needs_models:
        check_stages(config, directory, start)
    sharding.check_layout(config, used_models(config, directory), mesh)
    directory.claim(config)
    return CheckedRun(config, directory, mesh, start)


def check_adapters(config: RunConfig):
    """Raises ValueError for adapters of nothing: of weights that are random, or of no matrix."""
    lora = config.blt.lora
    if not lora.rank:
        return
    if not config.start_from:
        raise ValueError(
            f"blt.lora.rank={lora.rank}: adapters adapt trained weights, give their directory as "
            "start_from, or rank 0"
        )
    names = functional.matrix_names(config.blt)
    for pattern in lora.targets:
        if not any(matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1) or names[:1]
            raise ValueError(
                f"blt.lora.targets: {pattern!r} matches no matrix: did you mean {near[0]}? There "
                f"are {', '.join(names)}"
            )


def used_models(config: RunConfig, directory: RunDirectory | None = None) -> list[str]:
    """Returns the models that the stages run in a working directory, not only those they train."""
    stages = set(config.stages)
    tokens = "token_model" in stages
    if stages == {"evaluate"} and directory is not None:
        tokens = directory.evaluated() == "token_model"
    blt = bool(stages & {"blt", "sample"}) or (stages == {"evaluate"} and not tokens)
    patched = blt or "entropies" in stages
    entropy_model = "entropy_model" in stages or (patched and needs_entropies(config.patching))
    return ["entropy_model"] * entropy_model + ["blt"] * blt + ["token_model"] * tokens


def check_stages(config: RunConfig, directory: RunDirectory, start: Weights | None = None):
    """Raises ValueError where a model that the stages use is not trained by them, or before."""
    used = used_models(config, directory)
    if rule_of(config.patching).needs_delimiters and "blt" in used:
        raise ValueError(
            f"patching.rule={config.patching.rule!r} starts patches at delimiters (id 3), which "
            "files of raw bytes do not have: choose another rule"
        )
    for name in used:
        if name in config.stages or directory.is_trained(name) or (start and name in start.params):
            continue
        if name == "entropy_model" and has_all_entropies(config, directory):
            continue
        raise ValueError(
            f"stages={config.stages} need a trained {name} in {directory.path}, and there is none: "
            f"add the stage {name!r}, or run it first in that --workdir"
        )


def has_all_entropies(config: RunConfig, directory: RunDirectory) -> bool:
    """Returns whether the stages need no entropy model because the records have its results."""
    if config.patching.in_step or {"entropy_model", "sample"} & set(config.stages):
        return False
    try:
        store = open_store(directory.records(config))
    except (NoRecords, Unfinished):
        return False
    return not without_entropies(store.directory, store.all_shards)


def check_sources(config: RunConfig, directory: RunDirectory):
    """Raises ValueError or OSError where there are neither records nor text to make them of."""
    chats = any(source.kind == "chat" for source in config.data.sources)
    by_bytes = config.data.chat.template == "bytes" and "blt" in config.stages
    if chats and by_bytes and not config.patching.turns:
        raise ValueError(
            "patching.turns=False: with conversations (a source of kind 'chat') patches should "
            "start at turns, set it True"
        )
    if config.data.records:
        store = open_store(config.data.records)
        if "entropy_model" in config.stages and (store.directory / ENTROPIES).exists():
            raise ValueError(
                f"the records in {store.directory} have the entropies of a model already: leave "
                "the stage 'entropy_model' out, or import that model with bltjax preprocess "
                "--entropy_model=DIR"
            )
    elif not directory.records(config).exists():
        for source in config.data.named_sources():
            units = list_units(source, config.data)
            if source.kind != "huggingface" and not any(unit.size for unit in units):
                raise ValueError(
                    f"the files at {source.path!r} (source {source.name!r}) hold no bytes: choose "
                    "another path"
                )
            refuse_without_document(units, source, config.data)
