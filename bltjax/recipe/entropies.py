"""Entropies of a corpus, the calibrated threshold, and the rows that follow from it."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bltjax import sharding
from bltjax.checkpoints.fingerprints import digest
from bltjax.checkpoints.run_directory import entropy_params, is_finished, is_trained
from bltjax.config import ENTROPY_RULES, PatchingConfig, RunConfig, to_dict
from bltjax.data.batches.lanes import Layout
from bltjax.data.records import store as records
from bltjax.data.records.entropies import add_entropies, make_entropy_fn, receptive_bytes
from bltjax.data.records.store import Documents, Shard, Store
from bltjax.patching.boundaries import lengths_from_starts, patch_starts
from bltjax.patching.calibrate import RULES, ScoreHistogram, row_bytes_for, row_patches_for
from bltjax.recipe.corpus import needed_bytes, select, shares
from bltjax.vocabulary import encode


def bring_entropy_model(config, workdir: Path, source: Path):
    """Puts the entropy model of a directory of any format in the place of a trained one.

    Raises ValueError where its settings are not those of the config, and where another model is
    there already.
    """
    from bltjax.checkpoints import formats, placing
    from bltjax.checkpoints.fingerprints import digest
    from bltjax.checkpoints.orbax_weights import save_weights
    from bltjax.checkpoints.run_directory import WEIGHTS, entropy_params, is_trained
    from bltjax.config import differences, to_dict
    from bltjax.model import functional
    from bltjax.runtime.files import alone

    weights = formats.read(source)
    if weights.entropy_model is None:
        raise ValueError(f"{source} has no entropy model: give a directory that has one")
    changed = differences(to_dict(weights.entropy_model), to_dict(config.entropy_model))
    if changed:
        raise ValueError(
            f"the entropy model in {source} is not that of the config "
            f"({changed[0].replace('config.', 'entropy_model.', 1)}): change the config"
        )
    params, stage = weights.params["entropy_model"], workdir / "entropy_model"
    with alone(workdir):  # other processes may bring it at once
        if not is_trained(stage):
            save_weights(stage / WEIGHTS, params)
    given = placing.put_lazy(params, functional.abstract_params(config.entropy_model))
    if digest(given) != digest(entropy_params(config, workdir)):
        raise ValueError(
            f"{stage} holds another entropy model than {source}: leave --entropy_model out, or "
            "choose another --workdir"
        )


CALIBRATION_BYTES = 2_000_000  # or a shard of each source, where patches are found in the step


ROWS_PER_DEVICE = 4  # of the entropy model at a time


SAMPLE_BYTES, SAMPLE_SHARDS = 8_000_000, 256  # of documents whose patches are measured


WEIGHT_STEPS = 1000  # to which the weights of sources are rounded in calibration


IN_STEP_ROOM = 1.15  # patch columns over the mean of a row: no packer keeps rows within a budget


class Patched(NamedTuple):
    """What the byte latent transformer is trained on."""

    patching: PatchingConfig  # with the calibrated threshold
    mean_patch_bytes: float
    lengths: np.ndarray  # patch lengths of a sample
    train: list[Shard]
    validation: list[Shard]
    compilations: int  # of the entropy model


def find_patches(config: RunConfig, workdir: Path, store: Store, everything: bool) -> Patched:
    """The patching of a run with its threshold, and the shards that its stages read.

    Their entropies are computed where they are missing and needed; of the whole corpus if
    `everything`. Raises ValueError.
    """
    patching, needed = config.patching, needed_bytes(config, config.blt_training)
    train = select(config, store, needed)
    validation = select(config, store, config.evaluation.max_bytes, "validation")
    sample, counts, compilations = train, None, 0
    if patching.rule in ENTROPY_RULES:
        if everything:
            sample = store.shards()
            wanted = sample + store.shards(part="validation")
        elif patching.in_step:
            wanted = sample = select(config, store, min(CALIBRATION_BYTES, needed))
        else:
            wanted = train + validation
        compilations = ensure_entropies(config, workdir, store, wanted)
        counts = histogram(config, store, sample)
        threshold = stored_threshold(workdir)
        if threshold is None and patching.target_patch_bytes is not None:
            threshold = counts.threshold(patching.target_patch_bytes, patching.rule)
        if threshold is not None:
            patching = dataclasses.replace(patching, threshold=threshold)
    lengths = sample_lengths(patching, sample)
    if counts is not None and patching.rule in RULES and patching.max_patch_length is None:
        mean = counts.mean_patch_bytes(patching.threshold, patching.rule)
    else:
        by_source = shares(config, store).items()
        patches_a_byte = [share / lengths[name].mean() for name, share in by_source if share]
        mean = 1 / sum(patches_a_byte)
    every = np.concatenate(list(lengths.values()))
    return Patched(patching, mean, every, train, validation, compilations)


def stored_threshold(workdir: Path) -> float | None:
    """The threshold that was found first in a working directory; what is trained depends on it."""
    path = workdir / "patching.json"
    return json.loads(path.read_text())["threshold"] if path.exists() else None


def histogram(config: RunConfig, store: Store, shards: list[Shard]) -> ScoreHistogram:
    """Of the shards, each source counted as often as its share of the mixture asks for."""
    parts = {source: ScoreHistogram() for source in store.sources}
    for (source, _), part in records.score_histogram(shards).items():
        parts[source].merge(part)
    per_byte = {
        source: share / parts[source].num_positions
        for source, share in shares(config, store).items()
        if share and parts[source].num_positions
    }
    total = ScoreHistogram()
    for source, weight in per_byte.items():
        total.merge(parts[source], round(WEIGHT_STEPS * weight / min(per_byte.values())))
    return total


def sample_lengths(patching: PatchingConfig, shards: list[Shard]) -> dict[str, np.ndarray]:
    """Patch lengths of each source: of the first documents of some shards, SAMPLE_BYTES in all."""
    found = collections.defaultdict(list)
    sources = [[s for s in shards if s.source == name] for name in {s.source: 0 for s in shards}]
    for own in sources:
        own = own[:: -(-len(own) // SAMPLE_SHARDS)]
        share = SAMPLE_BYTES // len(own) // len(sources)
        for shard in own:
            size = 0
            for document in Documents([shard], entropies=patching.rule in ENTROPY_RULES):
                ids = encode(document.data)
                starts = patch_starts(patching, ids, document.entropies)[: len(ids)]
                found[shard.source].append(lengths_from_starts(starts))
                size += len(ids)
                if size >= share:
                    break
    return {source: np.concatenate(lengths) for source, lengths in found.items()}


def ensure_entropies(config: RunConfig, workdir: Path, store: Store, shards: list[Shard]) -> int:
    """Computes the entropies that shards lack; returns how often the entropy model was compiled.

    Without a model in the working directory those that are there are taken as they are. Raises
    ValueError where they are of another model, or missing without one.
    """
    has_model = is_trained(workdir / "entropy_model")
    if not has_model and all(records.has_entropies(shard) for shard in shards):
        return 0
    if not is_finished(config.entropy_training, workdir / "entropy_model"):
        unfinished = "only a part of its training" if has_model else "no entropy model"
        raise ValueError(
            f"the records in {store.directory} need entropies, and there is {unfinished} in "
            f"{workdir}: run the stage 'entropy_model' to its end first, or bring a model with "
            "bltjax.preprocess --entropy_model=DIR"
        )
    params = entropy_params(config, workdir)
    model = dict(
        entropy_model=to_dict(config.entropy_model),
        reset_at_newlines=config.patching.reset_at_newlines,
        parameters=digest(params),
    )
    records.claim_entropies(store, model)
    entropy_fn = make_entropy_fn(config.entropy_model, config.patching.reset_at_newlines)
    # Windows of a longer document start with what its bytes look back on: at most a quarter.
    row_bytes = max(config.entropy_training.row_bytes, 4 * receptive_bytes(config.entropy_model))
    # Each process works on shards of its own. A device gets rows of one shape and no more than
    # rows, on any mesh: so the entropies are the same bits wherever they are computed.
    params, mesh = sharding.on_host(params), sharding.local_mesh()
    batch_size = ROWS_PER_DEVICE * sharding.num_row_shards(mesh)
    with jax.set_mesh(mesh):
        params = sharding.put_whole(params)
        model_config = config.entropy_model
        add_entropies(store, shards, entropy_fn, params, model_config, row_bytes, batch_size)
    sharding.barrier("the entropies are there")
    return entropy_fn._cache_size()


def blt_layout(config: RunConfig, patched: Patched) -> Layout:
    """Rows of the byte latent transformer; budgets that are 0 follow from the mean patch.

    Where patches are found in the step, rows have none, see `in_step_patches`.
    """
    stage, mean = config.blt_training, patched.mean_patch_bytes
    row_bytes = stage.row_bytes or row_bytes_for(stage.row_patches, mean)
    if config.patching.in_step:
        return Layout(row_bytes)
    return Layout(
        row_bytes, stage.row_patches or row_patches_for(row_bytes, mean), patched.patching
    )


def in_step_patches(config: RunConfig, patched: Patched, row_bytes: int) -> int:
    """Patch columns of rows whose patches are found in the step."""
    mean = max(patched.mean_patch_bytes / IN_STEP_ROOM, 1.0)
    return config.blt_training.row_patches or row_patches_for(row_bytes, mean)
