"""The corpus of a run: its records, and the order in which a stage reads them.

A stage reads no more of a large corpus than its steps need: shards in a seeded order, of each
source its share.
"""

import numpy as np

from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import TRAINING, RunConfig, TrainingConfig
from bltjax.data import on_ray
from bltjax.data.batches.lanes import Layout
from bltjax.data.batches.order import InOrder, Mixture, Shuffled
from bltjax.data.records import store as records
from bltjax.data.records.store import Documents, Shard, Store
from bltjax.data.sources.units import no_document
from bltjax.training.loop import TrainingData


def open_corpus(
    config: RunConfig, directory: RunDirectory, cluster: on_ray.Cluster | None = None
) -> Store:
    """Opens the records of a run, made from its sources if need be, by a cluster if one is given.

    Records that `data.records` names are opened as they are. Raises ValueError where a part that
    the stages use is empty.
    """
    if config.data.records:
        store = records.open_store(config.data.records)
    else:
        store = records.build(directory.records(config), config.data, cluster)
    measured = any(
        config.trained(name)[1].validate_every for name in TRAINING if name in config.stages
    )
    bad = [record for of_source in store.bad.values() for record in of_source.first]
    if bad and not any(map(store.documents, records.PARTS)):
        reason = no_document(bad, f"the sources of {store.directory}")
        raise ValueError(f"{reason}; then delete that directory")
    wanted = ["train"] + ["validation"] * ("evaluate" in config.stages or measured)
    for part in wanted:
        if not store.num_bytes(part):
            raise ValueError(
                f"the records in {store.directory} have no text for {part}: give more, or another "
                "data.validation_fraction or data.seed in a new --workdir, or leave the stage "
                "'evaluate' out and validate_every 0"
            )
    check_external_entropies(config, directory, store)
    return store


def shares(config: RunConfig, store: Store) -> dict[str, float]:
    """Returns each source's share of the bytes: by weight, or by size where none has one.

    Raises ValueError where the records have other sources than the settings.
    """
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


def needed_bytes(config: RunConfig, training: TrainingConfig) -> int:
    """Returns the bytes that the steps of a stage read, or more where rows have no length yet."""
    patching = config.patching
    mean = patching.target_patch_bytes or max(patching.patch_size, 8)
    row_bytes = training.row_bytes or int(2 * training.row_patches * mean)
    return training.steps * training.batch_size * row_bytes


def select(config: RunConfig, store: Store, num_bytes: int, part: str = "train") -> list[Shard]:
    """Returns shards of at least `num_bytes`, each source giving its share, or all there are."""
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
    """Returns the documents of shards in the order and the mixture of the settings.

    Raises ValueError where a source has a weight and no document.
    """
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
    """Returns every document of the shards once, source by source."""
    of_source = ([s for s in shards if s.source == name] for name in store.sources)
    return InOrder([Documents(own, entropies=entropies) for own in of_source])


def check_external_entropies(config: RunConfig, directory: RunDirectory, store: Store):
    """Raises ValueError where entropies of two models would be mixed.

    Sources may come with entropies, of a model that the run does not have: all do, or none.
    """
    if (store.directory / records.ENTROPIES).exists():
        return
    bare = {shard.stem for shard in records.without_entropies(store.directory, store.all_shards)}
    found = [shard for shard in store.all_shards if shard.stem not in bare]
    external = [shard for shard in found if not records.model_of(shard)]
    if not external:
        return
    if len(external) < len(store.all_shards):
        without = {shard.source for shard in store.all_shards} - {s.source for s in external}
        raise ValueError(
            f"some records in {store.directory} came with entropies and those of {sorted(without)} "
            "did not: one model must give all of them, so train on such sources apart"
        )
    ours = [s for s in ("entropy_model", "sample") if s in config.stages]
    if ours or config.patching.in_step or directory.is_trained("entropy_model"):
        raise ValueError(
            f"the records in {store.directory} came with the entropies of a model that this run "
            f"does not have: leave the stages {ours} and patching.in_step out, and use a --workdir "
            "without an entropy model"
        )
