"""The corpus of a run: its records, their entropies, the threshold, the order it is read in.

    workdir/records/        documents, and their entropies (bltjax/data/records.py)
    workdir/patching.json   the rule, with the calibrated threshold

A stage reads no more of a large corpus than its steps need: shards in a seeded order, of each
source its share.
"""

import collections
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bltjax import sharding
from bltjax.config import ENTROPY_RULES, PatchingConfig, RunConfig, TrainingConfig, to_dict
from bltjax.data import records
from bltjax.data.entropies import add_entropies, make_entropy_fn, receptive_bytes
from bltjax.data.lanes import Layout
from bltjax.data.mixture import InOrder, Mixture, Shuffled
from bltjax.data.records import Documents, Shard, Store
from bltjax.patching.boundaries import lengths_from_starts, patch_starts
from bltjax.patching.calibrate import RULES, ScoreHistogram, row_bytes_for, row_patches_for
from bltjax.training.fingerprint import digest
from bltjax.training.loop import TrainingData
from bltjax.training.trained import entropy_params, is_finished, is_trained
from bltjax.vocabulary import encode

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


def records_directory(config: RunConfig, workdir: Path) -> Path:
    return Path(config.data.records) if config.data.records else workdir / "records"


def open_corpus(config: RunConfig, workdir: Path) -> Store:
    """The records of a run, made from its sources if need be.

    Records that `data.records` names are opened as they are. Raises ValueError where a part that
    the stages use is empty.
    """
    if config.data.records:
        store = records.open_store(config.data.records)
    else:
        store = records.build(records_directory(config, workdir), config.data)
    wanted = ["train"] + ["validation"] * ("evaluate" in config.stages)
    for part in wanted:
        if not store.num_bytes(part):
            raise ValueError(
                f"the records in {store.directory} have no text for {part}: give more, or another "
                "data.validation_fraction or data.seed in a new --workdir, or leave the stage "
                "'evaluate' out"
            )
    check_brought_entropies(config, workdir, store)
    return store


def shares(config: RunConfig, store: Store) -> dict[str, float]:
    """The share of the bytes that each source gives: by weight, or by size where none has one."""
    weights = {s.name: s.weight for s in config.data.named_sources()}
    if not any(weights.values()):
        weights = {s: sum(x.num_bytes for x in store.shards(s)) for s in store.sources}
    if set(store.sources) != set(weights):
        raise ValueError(
            f"the records in {store.directory} have the sources {store.sources}, and data.sources "
            f"gives weights to {list(weights)}: name the same, or leave all weights 0"
        )
    total = sum(weights[name] for name in store.sources)
    return {name: weights[name] / (total or 1) for name in store.sources}


def needed_bytes(config: RunConfig, stage: TrainingConfig) -> int:
    """What the steps of a byte model read; more where the length of rows is not known yet."""
    patching = config.patching
    mean = patching.target_patch_bytes or max(patching.patch_size, 8)
    return stage.steps * stage.batch_size * (stage.row_bytes or int(2 * stage.row_patches * mean))


def select(config: RunConfig, store: Store, num_bytes: int, part: str = "train") -> list[Shard]:
    """Shards of at least so many bytes, of each source its share, or all there are."""
    chosen = []
    for source, share in shares(config, store).items():
        shards = [shard for shard in store.shards(source, part) if shard.documents]
        wanted, size = [], 0
        for i in np.random.default_rng(config.data.seed).permutation(len(shards)):
            if wanted and size >= share * num_bytes:
                break
            wanted.append(i)
            size += shards[i].num_bytes
        chosen += [shards[i] for i in sorted(wanted)]
    return chosen


def training_data(
    config: RunConfig, store: Store, shards: list[Shard], layout: Layout, entropies: bool
) -> TrainingData:
    """Shards in the order and the mixture that the settings ask for. Raises ValueError."""
    names = tuple(store.sources)
    of_source = [[s for s in shards if s.source == name] for name in names]
    documents = [Documents(own, entropies=entropies) for own in of_source]
    if any(source.weight for source in config.data.named_sources()):
        empty = [name for name, d in zip(names, documents, strict=True) if not len(d)]
        if empty:
            raise ValueError(
                f"sources {empty} have a weight and no document for training: leave them out, or "
                "give them more text"
            )
        means = [
            2 + sum(s.num_bytes for s in own) / sum(s.documents for s in own) for own in of_source
        ]
        order = Mixture(documents, list(shares(config, store).values()), means, config.data.seed)
    else:
        order = Shuffled(documents, config.data.seed)
    return TrainingData(order, layout, names, config.data.workers)


def in_order(store: Store, shards: list[Shard], entropies: bool) -> InOrder:
    """Every document of the shards once, source by source."""
    of_source = ([s for s in shards if s.source == name] for name in store.sources)
    return InOrder([Documents(own, entropies=entropies) for own in of_source])


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
    sharding.meet("the entropies are there")
    return entropy_fn._cache_size()


def check_brought_entropies(config: RunConfig, workdir: Path, store: Store):
    """Entropies that sources brought are of a model that we do not have: all of them, or none.

    Raises ValueError where they would be mixed with those of a model of this run.
    """
    brought = [shard for shard in store.all_shards if records.has_entropies(shard)]
    if not brought or (store.directory / records.ENTROPIES).exists():
        return
    if len(brought) < len(store.all_shards):
        without = {shard.source for shard in store.all_shards} - {s.source for s in brought}
        raise ValueError(
            f"some records in {store.directory} came with entropies and those of {sorted(without)} "
            "did not: one model must give all of them, so train on such sources apart"
        )
    ours = [s for s in ("entropy_model", "sample") if s in config.stages]
    if ours or config.patching.in_step or is_trained(workdir / "entropy_model"):
        raise ValueError(
            f"the records in {store.directory} came with the entropies of a model that this run "
            f"does not have: leave the stages {ours} and patching.in_step out, and use a --workdir "
            "without an entropy model"
        )


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
