"""Entropies of a corpus, the calibrated threshold, and the rows that follow from it."""

import collections
import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bltjax import sharding
from bltjax.checkpoints import formats, placing
from bltjax.checkpoints.fingerprints import digest
from bltjax.checkpoints.orbax_weights import save_weights
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import PatchingConfig, RunConfig, differences, to_dict, to_model_dict
from bltjax.data import on_ray
from bltjax.data.batches.lanes import Layout
from bltjax.data.records import store as records
from bltjax.data.records.entropies import Computer, TrainedModel, receptive_bytes
from bltjax.data.records.store import Documents, Shard, Store
from bltjax.data.sources.readers import Document
from bltjax.model import functional
from bltjax.patching.boundaries import lengths_from_starts, needs_entropies, patch_starts
from bltjax.patching.calibrate import (
    CALIBRATED,
    ScoreHistogram,
    row_bytes_for,
    row_patches_for,
    search_threshold,
)
from bltjax.recipe.corpus import needed_bytes, select, shares
from bltjax.runtime.files import alone
from bltjax.vocabulary import encode

# Or a shard of each source, where patches are found in the step; and of documents for a search.
CALIBRATION_BYTES = 2_000_000
SAMPLE_BYTES, SAMPLE_SHARDS = 8_000_000, 256  # of documents whose patches are measured
WEIGHT_STEPS = 1000  # to which the weights of sources are rounded in calibration
IN_STEP_ROOM = 1.15  # patch columns over the mean of a row: no packer keeps rows within a budget


class Patched(NamedTuple):
    """The patches of a corpus, as the byte latent transformer is trained on them."""

    patching: PatchingConfig  # with the calibrated threshold
    mean_patch_bytes: float  # of all text that was measured
    lengths: np.ndarray  # patch lengths of a sample
    train: list[Shard]
    validation: list[Shard]
    compilations: int  # of the entropy model
    read_patch_bytes: float | None = None  # mean of what the steps read, where more was measured

    @property
    def row_mean(self) -> float:
        """The mean patch that rows are sized for."""
        return self.read_patch_bytes or self.mean_patch_bytes


def import_entropy_model(config: RunConfig, directory: RunDirectory, source: Path):
    """Puts the entropy model of a directory of any format in the place of a trained one.

    Raises ValueError where its settings are not those of the config, and where another model is
    there already.
    """
    external = formats.read(source)
    if external.entropy_model is None:
        raise ValueError(f"{source} has no entropy model: give a directory that has one")
    changed = differences(to_dict(external.entropy_model), to_dict(config.entropy_model))
    if changed:
        raise ValueError(
            f"the entropy model in {source} is not that of the config "
            f"({changed[0].replace('config.', 'entropy_model.', 1)}): change the config"
        )
    put_entropy_model(config, directory, external.params["entropy_model"], source)


def put_entropy_model(config: RunConfig, directory: RunDirectory, params: dict, source):
    """Puts parameters of a source, lazy arrays, in the place of a trained entropy model.

    Raises ValueError where another model is there already.
    """
    stage = directory.stage(config, "entropy_model")
    with alone(directory.path):  # other processes may import it at once
        if not directory.is_trained(stage.name):
            save_weights(stage.weights, params)
    given = placing.put_lazy(params, functional.abstract_params(config.entropy_model))
    if digest(given) != digest(stage.params()):
        raise ValueError(
            f"{stage.directory} holds another entropy model than {source}: leave that out, or "
            "choose another --workdir"
        )


def find_patches(
    config: RunConfig,
    directory: RunDirectory,
    store: Store,
    everything: bool = False,
    cluster: on_ray.Cluster | None = None,
) -> Patched:
    """Calibrates the threshold of a run, and computes the entropies that its stages read.

    everything: compute those of the whole corpus. cluster: that does both. A threshold that is in
    the working directory already stays. Raises ValueError where there is no model for missing
    entropies.
    """
    kept = directory.threshold() is not None
    patched, at = measure_patches(config, directory, store, everything, cluster), ""
    if needs_entropies(config.patching):
        directory.write_patching(patched.patching)
        sharding.barrier("a threshold is written")
        if sharding.any_process(directory.threshold() != patched.patching.threshold):
            # Another run was first.
            patched = measure_patches(config, directory, store, everything, cluster)
        at = f" at threshold {patched.patching.threshold:.4f} nats"
    read = f"in the {sum(shard.num_bytes for shard in patched.train)} bytes that the steps read"
    if patched.read_patch_bytes:
        at += f"; {patched.read_patch_bytes:.2f} {read}, which rows are sized for"
    elif kept:
        at += f", which was found before, {read}"
    print(f"patches: {patched.mean_patch_bytes:.2f} bytes on average{at}", flush=True)
    return patched


def measure_patches(
    config: RunConfig,
    directory: RunDirectory,
    store: Store,
    everything: bool,
    cluster: on_ray.Cluster | None = None,
) -> Patched:
    """Does the work of `find_patches` without writing the threshold."""
    patching, needed = config.patching, needed_bytes(config, config.blt_training)
    train = select(config, store, needed)
    validation = select(config, store, config.evaluation.max_bytes, "validation")
    sample = read = train
    counts, compilations = None, 0
    if needs_entropies(patching):
        wanted = train + validation
        if patching.in_step:
            wanted = sample = read = select(config, store, min(CALIBRATION_BYTES, needed))
        if everything:
            sample = store.shards()
            wanted = sample + store.shards(part="validation")
        compilations = ensure_entropies(config, directory, store, wanted, cluster)
        counts = histogram(config, store, sample, cluster)
        threshold = directory.threshold()
        if threshold is None and patching.target_patch_bytes is not None:
            threshold = wanted_threshold(config, store, sample, counts)
        if threshold is not None:
            patching = dataclasses.replace(patching, threshold=threshold)
    lengths = sample_lengths(patching, sample)
    mean = mean_patch(config, patching, store, sample, counts, lengths)
    of_read = mean_patch(config, patching, store, read) if read != sample else None
    every = np.concatenate(list(lengths.values()))
    return Patched(patching, mean, every, train, validation, compilations, of_read)


def wanted_threshold(
    config: RunConfig, store: Store, shards: list[Shard], counts: ScoreHistogram
) -> float:
    """Returns the threshold of the wanted mean patch: of shards, or of a sample of them.

    counts: of these shards. Raises ValueError where no threshold has that mean.
    """
    patching = config.patching
    if patching.rule in CALIBRATED:
        return counts.threshold(patching.target_patch_bytes, patching.rule)
    sample = sample_documents(shards, True, CALIBRATION_BYTES)  # it is walked a dozen times
    unlimited = dataclasses.replace(patching, max_patch_length=None)  # as in a histogram

    def mean_at(threshold: float) -> float:
        lengths = lengths_of(dataclasses.replace(unlimited, threshold=threshold), sample)
        return _mean_of_lengths(config, store, lengths)

    return search_threshold(patching.target_patch_bytes, mean_at)


def mean_patch(
    config: RunConfig,
    patching: PatchingConfig,
    store: Store,
    shards: list[Shard],
    counts: ScoreHistogram | None = None,
    lengths: dict[str, np.ndarray] | None = None,
) -> float:
    """Returns the mean patch of shards in bytes, each source weighted by its share of the mixture.

    counts, lengths: of these shards, if they are known already.
    """
    if patching.rule in CALIBRATED and patching.max_patch_length is None:
        counts = counts or histogram(config, store, shards)
        return counts.mean_patch_bytes(patching.threshold, patching.rule)
    return _mean_of_lengths(config, store, lengths or sample_lengths(patching, shards))


def _mean_of_lengths(config: RunConfig, store: Store, lengths: dict[str, np.ndarray]) -> float:
    by_source = shares(config, store).items()
    return 1 / sum(share / lengths[name].mean() for name, share in by_source if share)


def histogram(
    config: RunConfig, store: Store, shards: list[Shard], cluster: on_ray.Cluster | None = None
) -> ScoreHistogram:
    """Returns the scores of shards, each source weighted by its share of the mixture."""
    parts = {source: ScoreHistogram() for source in store.sources}
    for (source, _), part in (cluster or records).score_histogram(shards).items():
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
    """Returns patch lengths by source, of the first documents of some shards."""
    return lengths_of(patching, sample_documents(shards, needs_entropies(patching)))


def lengths_of(
    patching: PatchingConfig, documents: dict[str, list[Document]]
) -> dict[str, np.ndarray]:
    """Returns patch lengths by source of documents by source."""

    def lengths(document: Document) -> np.ndarray:
        ids = encode(document.data)
        starts = patch_starts(patching, ids, document.entropies)[: len(ids)]
        return lengths_from_starts(starts)

    return {name: np.concatenate([*map(lengths, own)]) for name, own in documents.items()}


def sample_documents(
    shards: list[Shard], entropies: bool, num_bytes: int = SAMPLE_BYTES
) -> dict[str, list[Document]]:
    """Returns the first documents of some shards, by source, with their entropies or without.

    num_bytes: about, in all; at least one document of each shard that is taken.
    """
    found = collections.defaultdict(list)
    sources = [[s for s in shards if s.source == name] for name in {s.source: 0 for s in shards}]
    for own in sources:
        own = own[:: -(-len(own) // SAMPLE_SHARDS)]
        share = num_bytes // len(own) // len(sources)
        for shard in own:
            size = 0
            for document in Documents([shard], entropies=entropies):
                found[shard.source].append(document)
                size += len(document.data) + 2
                if size >= share:
                    break
    return dict(found)


def ensure_entropies(
    config: RunConfig,
    directory: RunDirectory,
    store: Store,
    shards: list[Shard],
    cluster: on_ray.Cluster | None = None,
) -> int:
    """Computes the entropies that shards lack; returns how often this process compiled the model.

    Entropies that came with the corpus need no model. Raises ValueError where they are of another
    model, or missing without one.
    """
    stage = directory.stage(config, "entropy_model")
    has_model = directory.is_trained(stage.name)
    if not has_model and not records.without_entropies(store.directory, shards):
        return 0
    if not stage.is_finished():
        unfinished = "only a part of its training" if has_model else "no entropy model"
        raise ValueError(
            f"the records in {store.directory} need entropies, and there is {unfinished} in "
            f"{directory.path}: run the stage 'entropy_model' to its end first, or import a model "
            "with bltjax preprocess --entropy_model=DIR"
        )
    params = stage.params()
    model = dict(
        entropy_model=to_model_dict(stage.model),
        reset_at_newlines=config.patching.reset_at_newlines,
        parameters=digest(params),
    )
    claim = records.claim_entropies(store, model)
    # Windows of a longer document start with what its bytes look back on: at most a quarter.
    row_bytes = max(stage.training.row_bytes, 4 * receptive_bytes(stage.model))
    params, reset = sharding.on_host(params), config.patching.reset_at_newlines
    trained = TrainedModel(stage.model, params, reset, row_bytes, claim)
    compilations = 0
    if cluster:
        cluster.add_entropies(store, shards, trained)
    else:  # each process works on shards of its own
        computer = Computer(trained)
        computer.add(store, shards)
        compilations = computer.compilations()
    sharding.barrier("the entropies are there")
    return compilations


def blt_layout(config: RunConfig, patched: Patched, chat: tuple = ()) -> Layout:
    """Returns the rows of the byte latent transformer; budgets of 0 follow from the mean
    patch of what the steps read.

    Where patches are found in the step, rows have none, see `in_step_patches`. chat: of a store.
    """
    training, mean = config.blt_training, patched.row_mean
    row_bytes = training.row_bytes or row_bytes_for(training.row_patches, mean)
    if config.patching.in_step:
        return Layout(row_bytes, chat=chat)
    row_patches = training.row_patches or row_patches_for(row_bytes, mean)
    return Layout(row_bytes, row_patches, patched.patching, chat=chat)


def in_step_patches(config: RunConfig, patched: Patched, row_bytes: int) -> int:
    """Returns the patch columns of rows whose patches are found in the step."""
    mean = max(patched.row_mean / IN_STEP_ROOM, 1.0)
    return config.blt_training.row_patches or row_patches_for(row_bytes, mean)
