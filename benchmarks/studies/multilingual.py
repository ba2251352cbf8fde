"""Languages side by side: `python -m benchmarks.studies.multilingual --workdir=DIR --corpus=PATH`.

Every source of the corpus is a language. A BLT and its baselines, of equal FLOPs per byte, are
trained on the same mixture, as much of each language as there is of the others, with tokenizers of
that mixture; told are bits per byte and bytes per patch and token of each language. The baselines
are BPE as in the paper, BPE whose words keep their combining marks (the paper's pattern cuts words
of Hindi, Thai or Khmer at each vowel sign), the same with hash n-gram tables like the BLT's, and
bytes with such tables. Only sources that say the same thing compare languages fairly, see
--sources.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import app

from benchmarks.studies import pages, study
from benchmarks.studies.points import Point, account, width_for, with_flops
from benchmarks.studies.shared import Shared
from bltjax import cli
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import PatchingConfig
from bltjax.data import tokenizer
from bltjax.data.records.store import Documents, open_store
from bltjax.recipe import entropies

BUDGETS = {"laptop": 2e13, "gpu": 2e17, "pod": 4e20}  # training FLOPs of a point
LEVEL, PATCH = 1, 4.5
RULE = "falling"  # patches of similar length in all scripts, see benchmarks/studies/languages.py
SAMPLE_BYTES = 200_000  # of a language, on which its patches and tokens are measured


# Of baselines, the settings of `Shared.tokens`.
BASELINES = {
    "BPE": {},
    "BPE_marks": dict(pattern="marks"),
    "BPE_marks_tables": dict(pattern="marks", tables=True),
    "bytes_tables": dict(bytes_only=True, tables=True),
}


def plan(given: study.Settings, shared: Shared) -> list[Point]:
    blt = shared.blt("BLT", LEVEL, target=PATCH, rule=RULE, family="BLT")
    cost = account(blt).model["total"]
    others = [
        width_for(
            lambda dim, name=name, of=of: shared.tokens(name, LEVEL, dim, family=name, **of), cost
        )
        for name, of in BASELINES.items()
    ]
    return [with_flops(point, BUDGETS[given.size]) for point in (blt, *others)]


def by_language(given: study.Settings, shared: Shared, planned: Sequence[Point]) -> list[dict]:
    """A row for each source: of each family bits per byte, and bytes of a patch or a token."""
    results = {}
    for point in planned:
        path = RunDirectory(given.directory / "points" / point.name).result
        if path.exists():
            results[point.name] = json.loads(path.read_text())
    sizes = {
        "BLT": ("patch", patch_sizes(given, shared)),
        "BPE": ("token", token_sizes(shared, "letters")),
        "BPE_marks": ("token", token_sizes(shared, "marks")),
    }
    return [
        dict(language=language)
        | {
            f"{name}_bits_per_byte": r["sources"][language]["bits_per_byte"]
            for name, r in results.items()
            if language in r["sources"]
        }
        | {
            f"{name}_{part}_bytes": of_languages.get(language)
            for name, (part, of_languages) in sizes.items()
        }
        for language in sizes["BPE"][1]
    ]


def patch_sizes(given: study.Settings, shared: Shared) -> dict[str, float]:
    """Mean bytes of a patch of each source, at the threshold that the BLT was trained with."""
    threshold = RunDirectory(given.directory / "points" / "BLT").threshold()
    if threshold is None:
        return {}
    patching = PatchingConfig(rule=RULE, threshold=threshold)
    shards = open_store(shared.records).shards()
    lengths = entropies.sample_lengths(patching, shards)
    return {source: float(own.mean()) for source, own in lengths.items()}


def token_sizes(shared: Shared, pattern: str) -> dict[str, float]:
    """Mean bytes of a token of each source."""
    made, store = tokenizer.load(shared.tokenizer(pattern)), open_store(shared.records)
    found = {}
    for source in store.sources:
        num_bytes = tokens = 0
        for document in Documents(store.shards(source)):
            num_bytes += len(document.data)
            tokens += len(made.encode(document.data, add_bos=False, add_eos=False))
            if num_bytes >= SAMPLE_BYTES:
                break
        found[source] = num_bytes / max(tokens, 1)
    return found


def report(rows: Sequence[dict], languages: Sequence[dict], out: Path):
    """Two pictures and README.md of the rows of results.csv and languages.csv."""
    names = [row["family"] for row in rows]
    bits = {
        name.replace("_", " "): {
            row["language"]: row[f"{name}_bits_per_byte"]
            for row in languages
            if row.get(f"{name}_bits_per_byte")
        }
        for name in names
    }
    drawn = {
        "bytes of a patch": "BLT_patch_bytes",
        "bytes of a token": "BPE_token_bytes",
        "of a token, words with marks": "BPE_marks_token_bytes",
    }
    sizes = {
        name: {r["language"]: r[column] for r in languages if r.get(column)}
        for name, column in drawn.items()
    }
    sizes = {name: of for name, of in sizes.items() if of}
    pages.bars(out / "bits.png", bits, "bits per byte, held out")
    pages.bars(out / "sizes.png", sizes, "bytes")
    columns = {name: "" if name == "language" else ".3f" for row in languages for name in row}
    pages.write_page(
        out / "README.md",
        "Languages",
        "![bits per byte of each language](bits.png)",
        "![bytes per patch and per token of each language](sizes.png)",
        pages.table(languages, columns),
        pages.table(rows, dict(family="") | pages.QUALITY | pages.COST),
        *seen(languages),
    )


def seen(languages: Sequence[dict]) -> list[str]:
    """In how many languages the BLT is ahead of each baseline, and by how much at most."""
    sentences = []
    for name in BASELINES:
        gaps = {
            row["language"]: row["BLT_bits_per_byte"] - row[f"{name}_bits_per_byte"]
            for row in languages
            if row.get("BLT_bits_per_byte") and row.get(f"{name}_bits_per_byte")
        }
        if not gaps:
            continue
        best, worst = min(gaps, key=gaps.get), max(gaps, key=gaps.get)
        ahead = sum(gap < 0 for gap in gaps.values())
        sentences.append(
            f"The BLT is ahead of {name.replace('_', ' ')} in {ahead} of {len(gaps)} languages: by "
            f"{-gaps[best]:.4f} bits per byte in {best}, where it does best, and by "
            f"{-gaps[worst]:.4f} in {worst}, where it does worst."
        )
    return sentences


def main(argv):
    study.check(argv)
    given = study.settings()
    with study.guarded():
        shared = study.prepare(given, balanced=True)
        planned = plan(given, shared)
        rows = study.carry_out(given, planned)
        languages = by_language(given, shared, planned)
        pages.write_csv(given.out / "languages.csv", languages)
        report(rows, languages, given.out)
        study.finish(given, rows)


if __name__ == "__main__":
    study.define_flags()
    app.run(main, flags_parser=cli.parse)
