"""Equal FLOPs per byte: `python -m benchmarks.studies.fixed_inference --workdir=DIR`.

Models whose forward passes cost the same per byte, as in the paper's figure 1 and table 2: a larger
patch pays for a wider global transformer. BPE and BLTs with patches of 4, 6 and 8 bytes, each
trained on several amounts of text, each run with a schedule of its own. On larger hardware at two
costs of inference.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies import pages, study
from benchmarks.studies.points import Point, account, width_for, with_bytes

LEVELS = {"laptop": (0,), "gpu": (0, 1), "pod": (0, 1)}  # whose BPE model sets the cost
TRAINING_BYTES = {
    "laptop": (1.1e6, 2.2e6, 4.4e6),
    "gpu": (3e8, 1e9, 3e9),
    "pod": (3e10, 1e11, 3e11),
}
PATCHES = (4, 6, 8)


def plan(given: study.Settings) -> list[Point]:
    shared = study.prepare(given)
    found = []
    for level in LEVELS[given.size]:
        bpe = shared.tokens(f"BPE-{level}", level, family="BPE")
        cost = account(bpe).model["total"]
        families = [bpe]
        for patch in PATCHES:
            families.append(
                width_for(
                    lambda dim, level=level, patch=patch: shared.blt(
                        f"BLT_{patch}-{level}",
                        level,
                        dim,
                        target=patch,
                        family=f"BLT entropy {patch}",
                    ),
                    cost,
                )
            )
        for num_bytes in TRAINING_BYTES[given.size]:
            sized = [with_bytes(point, num_bytes) for point in families]
            found += [p._replace(name=f"{p.name}-{num_bytes / 1e6:g}MB") for p in sized]
    return found


def report(rows: Sequence[dict], out: Path):
    """A picture for each cost of inference, and README.md, of the rows of results.csv."""
    pictures = []
    for level in sorted({row["level"] for row in rows}):
        series = {}
        for row in (row for row in rows if row["level"] == level):
            series.setdefault(row["family"], []).append(
                (row["training_bytes"], row["bits_per_byte"], 0)
            )
        name = f"curves-{level}.png"
        pages.curves(out / name, series, "training bytes", "bits per byte, held out")
        pictures.append(f"![bits per byte against training bytes, level {level}]({name})")
    pages.write_page(
        out / "README.md",
        "Equal FLOPs per byte",
        *pictures,
        pages.table(rows, dict(family="", level="") | pages.QUALITY | pages.COST),
        *seen(rows),
    )


def seen(rows: Sequence[dict]) -> list[str]:
    """For each cost: from which amount of text on a BLT is better than BPE."""
    sentences = []
    for level in sorted({row["level"] for row in rows}):
        own = [row for row in rows if row["level"] == level]
        bpe = _ordered(own, "BPE")
        for family in dict.fromkeys(r["family"] for r in own if r["family"] != "BPE"):
            pairs = list(zip(_ordered(own, family), bpe, strict=False))
            better = [b for b, p in pairs if b["bits_per_byte"] < p["bits_per_byte"]]
            said = ", ".join(
                f"{b['bits_per_byte'] - p['bits_per_byte']:+.4f} at {b['training_bytes']:.2g} bytes"
                for b, p in pairs
            )
            sentences.append(
                f"Level {level}, {family}: {said} beside BPE; it is better in {len(better)} of "
                f"{len(pairs)}."
            )
    return sentences


def _ordered(rows: Sequence[dict], family: str) -> list[dict]:
    own = [row for row in rows if row["family"] == family]
    return sorted(own, key=lambda row: row["training_bytes"])


if __name__ == "__main__":
    study.main(plan, report)
