"""Does a threshold hold on other text? `python benchmarks/calibration.py --records=DIR`.

DIR is a store that `bltjax.preprocess` made. Two ways to hold text out:

    blocks      every second 16 KiB of all documents, so that both halves are of the same kind
    documents   the store's validation part: whole documents, which differ from the others as few
                documents do

Thresholds for several means are read off the histogram of one side, and the mean patch of the other
is counted at each. Prints a table and, last, a JSON line.
"""

import json
from pathlib import Path

from absl import app, flags

from bltjax import cli
from bltjax.data.records import store as records
from bltjax.patching.calibrate import CALIBRATED, ScoreHistogram

BLOCK = 16_384


def by_documents(store: records.Store) -> list[ScoreHistogram]:
    sides = []
    for part in records.PARTS:
        sides.append(ScoreHistogram())
        for counts in records.score_histogram(store.shards(part=part)).values():
            sides[-1].merge(counts)
    return sides


def by_blocks(store: records.Store) -> list[ScoreHistogram]:
    sides, number = [ScoreHistogram(), ScoreHistogram()], 0
    for document in records.Documents(store.all_shards, entropies=True):
        for first in range(0, len(document.entropies), BLOCK):
            sides[number % 2].add(document.entropies[first : first + BLOCK])
            number += 1
    return sides


def main(argv):
    chosen = flags.FLAGS
    if len(argv) > 1 or chosen.records is None:
        cli.fail("give --records=DIR, and nothing else but flags")
    store, result = records.open_store(Path(chosen.records)), {}
    if not all(records.has_entropies(shard) for shard in store.all_shards):
        cli.fail(f"{chosen.records} lacks entropies: run bltjax.preprocess first")
    for name, split in (("blocks", by_blocks), ("documents", by_documents)):
        seen, held_out = split(store)
        print(
            f"{name}: {seen.num_positions / 1e6:.1f} MB to calibrate on, "
            f"{held_out.num_positions / 1e6:.1f} MB held out\n"
            f"{'rule':12}{'wanted':>8}{'threshold':>12}{'held out':>10}{'off by':>9}"
        )
        for rule in CALIBRATED:
            for target in map(float, chosen.targets):
                threshold = seen.threshold(target, rule)
                mean = held_out.mean_patch_bytes(threshold, rule)
                result[f"{name}, {rule}, {target}"] = mean
                print(
                    f"{rule:12}{target:>8}{threshold:>12.4f}{mean:>10.3f}{mean / target - 1:>9.2%}"
                )
    print(json.dumps(result))


if __name__ == "__main__":
    flags.DEFINE_string("records", None, "A directory of records with entropies.")
    flags.DEFINE_list("targets", ["4.5", "6", "8"], "Bytes of the mean patch.")
    app.run(main, flags_parser=cli.parse)
