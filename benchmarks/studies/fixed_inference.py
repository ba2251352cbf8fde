"""Equal FLOPs per byte: `python -m benchmarks.studies.fixed_inference --workdir=DIR`.

Models whose forward passes cost the same per byte, as in the paper's figure 1 and table 2: a larger
patch pays for a wider global transformer. BPE, with and without hash n-gram tables like a BLT's,
and BLTs with patches of 4, 6 and 8 bytes, each trained on several amounts of text, each run with a
schedule of its own; bytes without patches, with such tables, on the largest amount alone. On larger
hardware at two costs of inference.
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
TABLES = "BPE with tables"


def plan(given: study.Settings) -> list[Point]:
    shared = study.prepare(given)
    found = []
    for level in LEVELS[given.size]:
        bpe = shared.tokens(f"BPE-{level}", level, family="BPE")
        cost = account(bpe).model["total"]
        families = [bpe, shared.tokens(f"BPE_tables-{level}", level, tables=True, family=TABLES)]
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
        amounts = TRAINING_BYTES[given.size]
        found += [_sized(point, amount) for amount in amounts for point in families]
        of_bytes = width_for(
            lambda dim, level=level: shared.tokens(
                f"bytes_tables-{level}",
                level,
                dim,
                bytes_only=True,
                tables=True,
                family="bytes with tables",
            ),
            cost,
        )
        found.append(_sized(of_bytes, amounts[-1]))
    return found


def _sized(point: Point, num_bytes: float) -> Point:
    point = with_bytes(point, num_bytes)
    return point._replace(name=f"{point.name}-{num_bytes / 1e6:g}MB")


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
    """For each cost and family: after which amounts of text it is better than either BPE."""
    sentences = []
    for level in sorted({row["level"] for row in rows}):
        own = [row for row in rows if row["level"] == level]
        for family in dict.fromkeys(row["family"] for row in own):
            for bpe in ("BPE", TABLES):
                pairs = _pairs(own, family, bpe)
                if family == bpe or not pairs:
                    continue
                gaps = [(b["bits_per_byte"] - p["bits_per_byte"], b) for b, p in pairs]
                said = ", ".join(f"{g:+.4f} at {b['training_bytes']:.2g} bytes" for g, b in gaps)
                sentences.append(
                    f"Level {level}, {family}: {said} beside {bpe}; it is better in "
                    f"{sum(gap < 0 for gap, _ in gaps)} of {len(gaps)}."
                )
    return sentences


def _pairs(rows: Sequence[dict], family: str, other: str) -> list[tuple[dict, dict]]:
    """Rows of two families after the same amounts of text, by the ends of their names."""
    by_amount = {_amount(row): row for row in rows if row["family"] == other}
    own = [row for row in rows if row["family"] == family and _amount(row) in by_amount]
    return [
        (row, by_amount[_amount(row)]) for row in sorted(own, key=lambda row: row["training_bytes"])
    ]


def _amount(row: dict) -> str:
    return row["name"].rsplit("-", 1)[-1]


if __name__ == "__main__":
    study.main(plan, report)
