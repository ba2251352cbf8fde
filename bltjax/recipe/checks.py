"""What must be right before a run writes anything: stages, sizes, mesh, text, working directory.

A working directory belongs to one config. `config.json` holds it, written when a run first claims
the directory and compared whenever it is resumed; the text is in its records.
"""

import os
from pathlib import Path
from typing import NamedTuple

import jax

from bltjax import sharding
from bltjax.checkpoints.run_directory import is_of_tokens, is_trained
from bltjax.config import RunConfig
from bltjax.data.records.store import ENTROPIES, has_entropies, open_store
from bltjax.data.sources.units import list_units
from bltjax.patching.boundaries import check_rule, needs_entropies, rule_of
from bltjax.recipe.corpus import records_directory
from bltjax.recipe.workdir import claim_workdir
from bltjax.sharding import check_batch_sizes, check_hash_updates


class Prepared(NamedTuple):
    """What must be right before anything is written."""

    config: RunConfig
    workdir: Path
    mesh: jax.sharding.Mesh


def prepare(config: RunConfig, workdir: str | os.PathLike, needs_models: bool = True) -> Prepared:
    """Check everything a run needs. Raises ValueError or OSError naming the value and remedy.

    Without `needs_models` those that the stages do not train may come later.
    """
    workdir = Path(workdir).absolute()
    mesh = sharding.make_mesh(config.mesh)
    check_rule(config.patching)
    check_sources(config, workdir)
    if needs_models:
        check_stages(config, workdir)
    check_batch_sizes(config, mesh)
    check_hash_updates(config, mesh)
    for name in used_models(config, workdir):
        sharding.check_model(getattr(config, name), name, mesh)
    claim_workdir(config, workdir)
    return Prepared(config, workdir, mesh)


def used_models(config: RunConfig, workdir: Path | None = None) -> list[str]:
    """The models that the stages run in a working directory, not only those they train."""
    stages = set(config.stages)
    tokens = "token_model" in stages
    if stages == {"evaluate"} and workdir is not None:
        tokens = is_of_tokens(stages, workdir)
    blt = bool(stages & {"blt", "sample"}) or (stages == {"evaluate"} and not tokens)
    patched = blt or "entropies" in stages
    entropy_model = "entropy_model" in stages or (patched and needs_entropies(config.patching))
    return ["entropy_model"] * entropy_model + ["blt"] * blt + ["token_model"] * tokens


def check_stages(config: RunConfig, workdir: Path):
    """A model that the stages use must be trained by them, or before. Raises ValueError."""
    used = used_models(config, workdir)
    if rule_of(config.patching).needs_delimiters and "blt" in used:
        raise ValueError(
            f"patching.rule={config.patching.rule!r} starts patches at delimiters (id 3), which "
            "files of raw bytes do not have: choose another rule"
        )
    for stage in used:
        if stage in config.stages or is_trained(workdir / stage):
            continue
        if stage == "entropy_model" and has_all_entropies(config, workdir):
            continue
        raise ValueError(
            f"stages={config.stages} need a trained {stage} in {workdir}, and there is none: "
            f"add the stage {stage!r}, or run it first in that --workdir"
        )


def has_all_entropies(config: RunConfig, workdir: Path) -> bool:
    """Whether the stages can do without an entropy model, since the records have its results."""
    if config.patching.in_step or {"entropy_model", "sample"} & set(config.stages):
        return False
    try:
        store = open_store(records_directory(config, workdir))
    except (FileNotFoundError, ValueError):  # none yet, or not whole yet
        return False
    return all(has_entropies(shard) for shard in store.all_shards)


def check_sources(config: RunConfig, workdir: Path):
    """There are records, or sources to make them of. Raises ValueError or OSError."""
    if config.data.records:
        store = open_store(config.data.records)
        if "entropy_model" in config.stages and (store.directory / ENTROPIES).exists():
            raise ValueError(
                f"the records in {store.directory} have the entropies of a model already: leave "
                "the stage 'entropy_model' out, or bring that model with bltjax.preprocess "
                "--entropy_model=DIR"
            )
    elif not records_directory(config, workdir).exists():
        for source in config.data.named_sources():
            units = list_units(source, config.data)
            if source.kind != "huggingface" and not any(unit.size for unit in units):
                raise ValueError(
                    f"the files at {source.path!r} (source {source.name!r}) hold no bytes: choose "
                    "another path"
                )
