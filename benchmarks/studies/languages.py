"""Patches of every language: `python -m benchmarks.studies.languages --workdir=DIR --corpus=PATH`.

Every source of the corpus is a language. Under one threshold of entropy a script whose bytes are
easy has huge patches, and one whose bytes are hard has hardly more than bytes. BLTs that differ in
the patching rule or the entropy model alone are trained on the same bytes, as many of each
language; told are bytes of a patch and bits per byte of each language, before and after.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from absl import app

from benchmarks.studies import pages, study
from benchmarks.studies.points import Point, is_finished, run_config, with_bytes, with_settings
from benchmarks.studies.shared import Shared
from bltjax import cli
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.data.records.store import open_store
from bltjax.recipe import entropies

TRAINING_BYTES = {"laptop": 2e6, "gpu": 2e9, "pod": 4e10}
PATCH = 4.5
WANTED = 2.5, 9.0  # bytes of a patch of any language
BEFORE, AFTER = "entropy", "falling"
RULES = {"shared": ("entropy", "monotonic", "falling"), "larger": ("entropy", "falling")}
STACK, TRAINING = "entropy_model.transformer.", "entropy_training."
LARGER = {  # settings of a larger entropy model that is trained for longer
    "laptop": {
        f"{STACK}dim": 96,
        f"{STACK}num_layers": 2,
        f"{STACK}num_heads": 6,
        f"{TRAINING}steps": 2000,
        f"{TRAINING}batch_size": 4,
    },
    "gpu": {f"{STACK}dim": 512, f"{STACK}num_layers": 10, f"{TRAINING}steps": 20_000},
    "pod": {f"{STACK}dim": 1152, f"{STACK}num_layers": 18, f"{TRAINING}steps": 200_000},
}


def plan(given: study.Settings) -> list[Point]:
    found = []
    for model, rules in RULES.items():
        settings = LARGER[given.size] if model == "larger" else {}
        shared = study.prepare(given, model, balanced=True, settings=settings)
        found += [point_of(shared, rule, model, settings) for rule in rules]
    return [with_bytes(point, TRAINING_BYTES[given.size]) for point in found]


def point_of(shared: Shared, rule: str, model: str, settings: dict) -> Point:
    family = rule if model == "shared" else f"{rule}, {model} entropy model"
    name = family.replace(", ", "-").replace(" ", "_")
    point = shared.blt(name, target=PATCH, rule=rule, family=family)
    return with_settings(point, settings)


def by_language(given: study.Settings, planned: Sequence[Point]) -> list[dict]:
    """A row for each source: of each family bytes of a patch, and bits per byte."""
    found = {}
    for point in planned:
        directory = given.directory / "points"
        if not is_finished(point, directory):
            continue
        run = RunDirectory(directory / point.name)
        result, config = json.loads(run.result.read_text()), run_config(point)
        threshold = run.threshold()
        patching = dataclasses.replace(config.patching, threshold=threshold)
        shards = open_store(config.data.records).shards()
        for language, lengths in entropies.sample_lengths(patching, shards).items():
            row = found.setdefault(language, dict(language=language))
            row[f"{point.about['family']}: patch_bytes"] = float(lengths.mean())
            bits = result["sources"].get(language, {}).get("bits_per_byte")
            row[f"{point.about['family']}: bits_per_byte"] = bits
    return list(found.values())


def column(languages: Sequence[dict], family: str, of: str) -> dict[str, float]:
    """What is known of the languages under a family: language -> value."""
    name = f"{family}: {of}"
    return {row["language"]: row[name] for row in languages if row.get(name) is not None}


def summary(languages: Sequence[dict], rows: Sequence[dict]) -> list[dict]:
    """A row for each family: how even its patches are, and what it costs in bits per byte."""
    found = []
    for row in rows:
        sizes = column(languages, row["family"], "patch_bytes")
        bits = column(languages, row["family"], "bits_per_byte")
        least, most = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
        found.append(
            dict(
                family=row["family"],
                outside=sum(not WANTED[0] <= size <= WANTED[1] for size in sizes.values()),
                least=sizes[least],
                of_least=least,
                most=sizes[most],
                of_most=most,
                mean_over_languages=statistics.fmean(bits.values()),
                bits_per_byte=row["bits_per_byte"],
                median_source=row["median_source"],
                patch_bytes=row["patch_bytes"],
            )
        )
    return found


def before_and_after(languages: Sequence[dict]) -> list[dict]:
    """The rule of one threshold beside the one that is recommended, language by language."""
    return [
        dict(
            language=row["language"],
            bytes_of_a_patch_before=row.get(f"{BEFORE}: patch_bytes"),
            after=row.get(f"{AFTER}: patch_bytes"),
            bits_per_byte_before=row.get(f"{BEFORE}: bits_per_byte"),
            after_=row.get(f"{AFTER}: bits_per_byte"),
        )
        for row in languages
    ]


def report(rows: Sequence[dict], languages: Sequence[dict], out: Path):
    """Pictures and README.md of the rows of results.csv and languages.csv."""
    families = [row["family"] for row in rows]
    sizes = {family: column(languages, family, "patch_bytes") for family in families}
    bits = {family: column(languages, family, "bits_per_byte") for family in families}
    pages.bars(out / "sizes.png", sizes, "bytes of a patch", log=True)
    pages.bars(out / "bits.png", bits, "bits per byte, held out")
    told, compared = summary(languages, rows), before_and_after(languages)
    pages.write_page(
        out / "README.md",
        "Patches of every language",
        "![bytes of a patch of each language](sizes.png)",
        "![bits per byte of each language](bits.png)",
        pages.table(told, {name: "" if name == "outside" else ".3f" for name in told[0]}),
        f"`outside`: languages whose mean patch is not of {WANTED[0]:g} to {WANTED[1]:g} bytes.",
        f"Before: the rule `{BEFORE}`. After: `{AFTER}`.",
        pages.table(compared, dict.fromkeys(compared[0], ".3f")),
        pages.table(rows, dict(family="") | pages.QUALITY | pages.COST),
        *seen(told),
    )


def seen(told: Sequence[dict]) -> list[str]:
    """A sentence for each family."""
    return [
        f"{row['family'].capitalize()}: patches of {row['least']:.2f} ({row['of_least']}) to "
        f"{row['most']:.2f} bytes ({row['of_most']}), {row['mean_over_languages']:.4f} bits per "
        "byte on average over languages."
        for row in told
    ]


def main(argv):
    study.check(argv)
    given = study.settings()
    with study.guarded():
        planned = plan(given)
        rows = study.carry_out(given, planned)
        languages = by_language(given, planned)
        pages.write_csv(given.out / "languages.csv", languages)
        report(rows, languages, given.out)
        study.finish(given, rows)


if __name__ == "__main__":
    study.define_flags()
    app.run(main, flags_parser=cli.parse)
