"""Reports the patches of a corpus: thresholds, means and lengths, by source and by language."""

from collections import Counter

from bltjax.config import PatchingConfig, RunConfig
from bltjax.data import on_ray
from bltjax.data.records import store as records
from bltjax.data.records.store import Store
from bltjax.evaluation.patches.pictures import histogram_lines
from bltjax.patching.boundaries import needs_entropies
from bltjax.patching.calibrate import CALIBRATED, ScoreHistogram, describe_lengths, length_histogram
from bltjax.recipe.entropies import Patched, blt_layout, in_step_patches, sample_lengths
from bltjax.runtime.terminal import print_table


def corpus_report(
    config: RunConfig, store: Store, patched: Patched, cluster: on_ray.Cluster | None = None
) -> dict:
    """Returns sizes, mean patch and threshold of the training part, by source and by language too.

    The `threshold` of a source or language is the one that would give it alone the wanted mean;
    None where none does. Under rules without a histogram sources have the mean patch of a sample
    alone. Patch lengths are those of a sample.
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
        read_bytes=sum(shard.num_bytes for shard in patched.train),
        read_patch_bytes=patched.row_mean,
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
        _add_thresholds(report, config, store, patched, cluster)
    else:
        _add_means(report, store, patching)
    return report


def _add_means(report: dict, store: Store, patching: PatchingConfig):
    known = [s for s in store.shards() if records.has_entropies(s)]
    shards = known if needs_entropies(patching) else store.shards()
    for source, lengths in sample_lengths(patching, shards).items():
        report["sources"][source]["mean_patch_bytes"] = float(lengths.mean())


def _add_thresholds(report: dict, config: RunConfig, store: Store, patched: Patched, cluster):
    by_source, by_language = {}, {}
    shards = [s for s in store.shards() if records.has_entropies(s)]
    for (source, language), part in (cluster or records).score_histogram(shards).items():
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
    """Prints a `corpus_report` for people."""
    threshold, sizes = report["threshold"], report["bytes"]
    at = "" if threshold is None else f" at threshold {threshold:.4f} nats"
    print(
        f"{report['documents']['train']} documents, {sizes['train']} bytes for training; "
        f"{report['documents']['validation']}, {sizes['validation']} held out\n"
        f"mean patch {report['mean_patch_bytes']:.3f} bytes{at}; "
        f"{report['read_patch_bytes']:.3f} in the {report['read_bytes']} bytes that the steps of a "
        f"run read from, so rows of {report['row_bytes']} bytes and {report['row_patches']} patches"
    )
    for kind, size, *bad in (("source", "bytes", "bad"), ("language", "positions")):
        keys = ("documents", size, "mean_patch_bytes", "threshold", *bad)
        rows = [(name, *map(row.get, keys)) for name, row in report[f"{kind}s"].items()]
        if rows:
            print()
            print_table((kind, "documents", size, "mean patch", "threshold", *bad), rows, digits=3)
    percentiles = ", ".join(f"{name} {length}" for name, length in report["lengths"].items())
    counts = Counter({n: count for n, count in enumerate(report["length_histogram"]) if count})
    print("\n".join([f"\nbytes of a patch, {percentiles}", *histogram_lines(counts)]))
