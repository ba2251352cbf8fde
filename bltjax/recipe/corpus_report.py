"""What a corpus looks like to the rule that patches it: thresholds, means, lengths of patches."""

from bltjax.config import RunConfig
from bltjax.data.records import store as records
from bltjax.data.records.store import Store
from bltjax.patching.boundaries import needs_entropies
from bltjax.patching.calibrate import CALIBRATED, ScoreHistogram, describe_lengths, length_histogram
from bltjax.recipe.entropies import Patched, blt_layout, in_step_patches
from bltjax.runtime.terminal import printable

_BAR = 40  # characters of the longest bar
_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 64, 128, 256)  # lengths that end a row


def corpus_report(config: RunConfig, store: Store, patched: Patched) -> dict:
    """Of the training part: sizes, mean patch and threshold, in all, by source and by language.

    A source's or language's `threshold` is the one that would give it the wanted mean by itself;
    None where none does. Patch lengths are those of a sample.
    """
    patching, histogram = patched.patching, length_histogram(patched.lengths)
    layout = blt_layout(config, patched)
    report = dict(
        records=str(store.directory),
        documents={part: store.documents(part) for part in records.PARTS},
        bytes={part: store.num_bytes(part) for part in records.PARTS},
        rule=patching.rule,
        threshold=patching.threshold if needs_entropies(patching) else None,
        target_patch_bytes=config.patching.target_patch_bytes,
        mean_patch_bytes=patched.mean_patch_bytes,
        row_bytes=layout.row_bytes,
        row_patches=layout.row_patches or in_step_patches(config, patched, layout.row_bytes),
        lengths=describe_lengths(histogram),
        length_histogram=histogram.tolist(),
        sources={
            name: dict(
                documents=sum(s.documents for s in store.shards(name)),
                bytes=sum(s.num_bytes for s in store.shards(name)),
                bad=store.bad[name].count if name in store.bad else 0,
            )
            for name in store.sources
        },
        languages={},
    )
    if patching.rule in CALIBRATED:
        _add_thresholds(report, config, store, patched)
    return report


def _add_thresholds(report: dict, config: RunConfig, store: Store, patched: Patched):
    by_source, by_language = {}, {}
    shards = [s for s in store.shards() if records.has_entropies(s)]
    for (source, language), part in records.score_histogram(shards).items():
        by_source.setdefault(source, ScoreHistogram()).merge(part)
        if language:
            by_language.setdefault(language, ScoreHistogram()).merge(part)

    def describe(histogram: ScoreHistogram) -> dict:
        rule, target = patched.patching.rule, config.patching.target_patch_bytes
        mean = histogram.mean_patch_bytes(patched.patching.threshold, rule)
        try:
            threshold = None if target is None else histogram.threshold(target, rule)
        except ValueError:  # too few documents, or too short ones
            threshold = None
        return dict(mean_patch_bytes=mean, threshold=threshold)

    for source, histogram in by_source.items():
        report["sources"][source] |= describe(histogram)
    for language, histogram in sorted(by_language.items()):
        sizes = dict(documents=histogram.num_documents, positions=histogram.num_positions)
        report["languages"][language] = sizes | describe(histogram)


def print_report(report: dict):
    threshold, sizes = report["threshold"], report["bytes"]
    at = "" if threshold is None else f" at threshold {threshold:.4f} nats"
    print(
        f"{report['documents']['train']} documents, {sizes['train']} bytes for training; "
        f"{report['documents']['validation']}, {sizes['validation']} held out\n"
        f"mean patch {report['mean_patch_bytes']:.3f} bytes{at}; rows of {report['row_bytes']} "
        f"bytes and {report['row_patches']} patches"
    )
    for kind in ("sources", "languages"):
        if report[kind]:
            _print_table(kind[:-1], report[kind])
    _print_lengths(report["length_histogram"], report["lengths"])


def _print_table(kind: str, rows: dict):
    names = {name: printable(name) for name in rows}
    width = max(len(kind), *map(len, names.values()))
    target = "its threshold"
    print(f"\n{kind:{width}}{'documents':>12}{'bytes':>14}{'mean patch':>12}{target:>15}")
    for name, row in rows.items():
        size = row.get("bytes", row.get("positions"))
        measured = [row.get("mean_patch_bytes"), row.get("threshold")]
        cells = ["-" if x is None else f"{x:.3f}" for x in measured]
        bad = f"  {row['bad']} bad records" if row.get("bad") else ""
        print(
            f"{names[name]:{width}}{row['documents']:>12}{size:>14}{cells[0]:>12}{cells[1]:>15}{bad}"
        )


def _print_lengths(histogram: list[int], percentiles: dict):
    total, first, groups = sum(histogram), 1, []
    for last in _ROWS:
        groups.append((first, last, sum(histogram[first : last + 1]) / total))
        first = last + 1
    most = max(share for *_, share in groups)
    print("\nbytes of a patch, " + ", ".join(f"{k} {v}" for k, v in percentiles.items()))
    for first, last, share in groups:
        name = f"{first}" if first == last else f"{first}-{last}" if last < 256 else f"{first}+"
        print(f"{name:>8} {share:7.2%} {'#' * round(_BAR * share / most)}")
