"""How much of a row is padding, ours and others': `python benchmarks/packing.py --records=DIR`.

DIR is a store that `bltjax.preprocess` made. The threshold is calibrated to --target bytes a patch,
all documents are packed once in one shuffled order, and what is not text is weighed as the compute
that it takes: bytes 26%, patches 74%, as in an 8B model. Recipes:

    ours                 two budgets, 32 documents open (bltjax/data/batches/packing.py)
    in one stream        two budgets, documents one after the other
    a document a row     the budgets of `ours`; what is longer goes on in further rows
    published            4,096 patches in 24,576 bytes, cut and padded (published_rows.py)
    published, shorter   the same at the row's length
    fixed patches        as many patches as the row's length holds on average, cut

Prints a table and, last, a JSON line.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags
from published_rows import Batch, pack_sequences, patch_sequences

from bltjax import cli
from bltjax.config import PatchingConfig
from bltjax.data.batches.lanes import Lane, Layout
from bltjax.data.batches.order import Shuffled
from bltjax.data.batches.packing import pack_patches
from bltjax.data.batches.rows import Row
from bltjax.data.records import store as records
from bltjax.patching.boundaries import lengths_from_starts, patch_starts
from bltjax.patching.calibrate import BYTE_COMPUTE, PATCH_COMPUTE, ScoreHistogram, row_patches_for
from bltjax.vocabulary import PAD_ID, encode

BATCH = 8  # rows that are padded together in the published recipe


class Sums:
    """Positions, patch slots, and what of them is text."""

    def __init__(self):
        self.positions = self.ids = self.slots = self.patches = self.lost = self.rows = 0
        self.pieces = 0

    def add(self, rows: Row | Batch, lost: int = 0):
        tokens = rows.tokens if isinstance(rows, Row) else rows.x
        lengths = np.atleast_2d(rows.patch_lengths)
        self.rows += len(lengths)
        self.positions += tokens.size
        real = np.atleast_2d(tokens != PAD_ID)
        self.ids += np.count_nonzero(real)
        self.slots += lengths.size
        before = np.cumsum(lengths, axis=1) - lengths  # a patch is real if it begins in the text
        self.patches += np.count_nonzero((lengths > 0) & (before < real.sum(axis=1)[:, None]))
        self.lost += lost
        if isinstance(rows, Row):
            self.pieces += len(np.unique(rows.document_ids[rows.tokens != PAD_ID]))

    def report(self, total: int) -> dict:
        padding = 1 - self.ids / self.positions, 1 - self.patches / self.slots
        return dict(
            byte_padding=padding[0],
            patch_padding=padding[1],
            compute_padding=BYTE_COMPUTE * padding[0] + PATCH_COMPUTE * padding[1],
            lost=self.lost / total,
            bytes_a_piece=self.ids / self.pieces if self.pieces else None,
        )


class Patched(NamedTuple):
    """Places -> (0, document), the order's documents, with their patches made once."""

    order: Shuffled
    patching: PatchingConfig

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for place in range(self.order.num_places):
            _, document = self.order[place]
            ids = encode(document.data)
            yield ids, patch_starts(self.patching, ids, document.entropies)[: len(ids)]


def two_budgets(patched: Patched, row_bytes: int, row_patches: int, pool: int) -> Sums:
    sums = Sums()
    lane = Lane(patched.order, Layout(row_bytes, row_patches, patched.patching, pool), 0, 1)
    for row in lane:
        sums.add(row)
    return sums


def a_document_a_row(patched: Patched, row_bytes: int, row_patches: int) -> Sums:
    sums = Sums()
    for document in patched:
        for row in pack_patches([document], row_bytes, row_patches):
            sums.add(row)
    return sums


def published(patched: Patched, row_bytes: int, row_patches: int) -> Sums:
    sums = Sums()
    documents = ((ids, lengths_from_starts(starts)) for ids, starts in patched)
    sequences = patch_sequences(documents, row_patches)
    while group := list(itertools.islice(sequences, BATCH)):
        batch = pack_sequences(group, row_bytes)
        sums.add(batch, batch.lost)
    return sums


def main(argv):
    chosen = flags.FLAGS
    if len(argv) > 1 or chosen.records is None:
        cli.fail("give --records=DIR, and nothing else but flags")
    store = records.open_store(Path(chosen.records))
    shards = store.shards()
    if not all(records.has_entropies(shard) for shard in shards):
        cli.fail(f"{chosen.records} lacks entropies: run bltjax.preprocess first")
    counts = ScoreHistogram()
    for part in records.score_histogram(shards).values():
        counts.merge(part)
    threshold = counts.threshold(chosen.target)
    mean = counts.mean_patch_bytes(threshold)
    documents = records.Documents(shards, entropies=True)
    patched = Patched(
        Shuffled([documents], seed=0, endless=False), PatchingConfig(threshold=threshold)
    )
    total = sum(s.num_bytes for s in shards) + 2 * len(documents)
    print(f"{len(documents)} documents, {total / 1e6:.1f} MB, mean patch {mean:.3f} bytes")
    results = {}
    for row_bytes in map(int, chosen.row_bytes):
        patches = row_patches_for(row_bytes, mean)
        recipes = {
            "ours": lambda L=row_bytes, P=patches: two_budgets(patched, L, P, 32),
            "in one stream": lambda L=row_bytes, P=patches: two_budgets(patched, L, P, 1),
            "a document a row": lambda L=row_bytes, P=patches: a_document_a_row(patched, L, P),
            "published, shorter": lambda L=row_bytes: published(patched, L, L // 6),
            "fixed patches": lambda L=row_bytes: published(patched, L, round(L / mean)),
        }
        for name, recipe in recipes.items():
            sums = recipe()
            results[f"{name}, {row_bytes}"] = sums.report(total)
    results["published, 24576"] = published(patched, 24_576, 4_096).report(total)
    columns = ("byte_padding", "patch_padding", "compute_padding", "lost")
    print(f"{'':28}" + "".join(f"{c.replace('_', ' '):>17}" for c in columns) + "    bytes a piece")
    for name, report in results.items():
        piece = report["bytes_a_piece"]
        cells = "".join(f"{report[c]:>17.1%}" for c in columns)
        print(f"{name:28}{cells}" + (f"{piece:>17.0f}" if piece else ""), flush=True)
    print(json.dumps(dict(documents=len(documents), bytes=total, mean_patch_bytes=mean, **results)))


if __name__ == "__main__":
    flags.DEFINE_string("records", None, "A directory of records with entropies.")
    flags.DEFINE_float("target", 4.5, "Bytes of the mean patch.")
    flags.DEFINE_list("row_bytes", ["8192", "16384"], "Lengths of rows.")
    app.run(main, flags_parser=cli.parse)
