"""Held-out rows of a run: for bits per byte while it trains, and at its end."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from bltjax.checkpoints.run_directory import RunDirectory, Stage
from bltjax.config import RunConfig
from bltjax.data.batches.lanes import Lane, Layout
from bltjax.data.batches.loader import whole_batches
from bltjax.data.batches.rows import Row
from bltjax.data.records.store import Shard, Store
from bltjax.evaluation.bits_per_byte import evaluate
from bltjax.evaluation.patch_use import make_patch_use_step
from bltjax.patching.boundaries import needs_entropies
from bltjax.recipe import corpus, token_corpus
from bltjax.recipe.entropies import Patched, blt_layout, in_step_patches
from bltjax.training.loop import InStep
from bltjax.training.metrics import HELD_OUT
from bltjax.training.patch_finder import make_patch_finder
from bltjax.training.step import make_eval_step


class HeldOut(NamedTuple):
    """Held-out documents as a model reads them, and the step that measures it on their rows."""

    layout: Layout
    shards: list[Shard]
    eval_step: Any
    frozen: list  # further arguments of the step
    entropies: bool = False  # of the records, which rows with patches are made of
    use_step: Any = None  # measures the use of patches, where the model has some

    def rows(self, store: Store, shards: list[Shard]) -> Lane:
        """Returns the rows of shards, which each document begins with as much context as it can."""
        documents = corpus.in_order(store, shards, self.entropies)
        return Lane(documents, self.layout._replace(pool=1), 0, 1)

    def sample(self, store: Store, num_rows: int) -> list[Row]:
        """Returns so many first rows, about, in even shares of the sources."""
        share = -(-num_rows // len(store.sources))
        of_source = ([s for s in self.shards if s.source == name] for name in store.sources)
        parts = (itertools.islice(self.rows(store, own), share) for own in of_source if own)
        return list(itertools.chain.from_iterable(parts))


def held_out(
    config: RunConfig,
    directory: RunDirectory,
    store: Store,
    patched: Patched | None,
    stage: Stage,
    in_step: InStep | None = None,
) -> HeldOut:
    """Returns the held-out documents for the model of a stage.

    patched: for a BLT alone. in_step: its patch finder, where that is there already.
    """
    shards, lengths, entropies = None, None, False
    layout = Layout(stage.training.row_bytes)
    if stage.name == "blt":
        shards, layout = patched.validation, blt_layout(config, patched, store.chat)
        if needs_entropies(config.patching):
            stage.check_data(threshold=patched.patching.threshold)
        in_step = in_step or in_step_patching(config, directory, patched, layout)
        entropies = bool(layout.row_patches) and needs_entropies(config.patching)
    elif stage.name == "token_model":
        tokenizer = token_corpus.ensure_tokenizer(config, directory, store)
        stage.check_data(tokenizer=tokenizer.digest)
        layout = layout._replace(tokenizer=tokenizer)
        lengths = tokenizer.byte_lengths(stage.model.vocab_size)
    if shards is None:
        shards = corpus.select(config, store, config.evaluation.max_bytes, "validation")
    finder, frozen = (in_step.find_patches, [in_step.entropy_params]) if in_step else (None, [])
    eval_step = make_eval_step(stage.model, finder, len(store.sources), lengths)
    use_step = make_patch_use_step(stage.model, finder) if stage.name == "blt" else None
    return HeldOut(layout, shards, eval_step, frozen, entropies, use_step)


def validation(config: RunConfig, store: Store, held: HeldOut) -> Callable[[dict], dict]:
    """Returns what measures parameters on a fixed sample of held-out rows."""
    rows = held.sample(store, config.evaluation.validation_rows)
    batches = list(whole_batches(iter(rows), config.evaluation.batch_size))

    def measure(params: dict) -> dict:
        found = evaluate(held.eval_step, params, batches, store.sources, *held.frozen)
        by_source = found["sources"].items()
        values = {f"{HELD_OUT}/{name}": source["bits_per_byte"] for name, source in by_source}
        return {HELD_OUT: found["bits_per_byte"]} | values

    return measure


def in_step_patching(
    config: RunConfig, directory: RunDirectory, patched: Patched, layout: Layout
) -> InStep | None:
    """Returns the patch finder of rows without patches; None where rows have them."""
    if layout.row_patches:
        return None
    columns = in_step_patches(config, patched, layout.row_bytes)
    if not needs_entropies(config.patching):
        return InStep(make_patch_finder(patched.patching, None, columns), None)
    stage = directory.stage(config, "entropy_model")
    return InStep(make_patch_finder(patched.patching, stage.model, columns), stage.params())
