"""Bits per byte against training FLOPs: `python -m benchmarks.studies.scaling --workdir=DIR`.

Eight families at three budgets of equal training FLOPs that span a factor of eight, as in the
paper's figure 6: BLTs with patches of 4, 6 and 8 bytes by entropy, with patches between spaces, a
transformer over BPE tokens, and one over bytes, each also with hash n-gram tables over its own ids,
of the rows, width and number that the BLTs' have. At each budget the global transformer of every
BLT and the transformer over tokens have one shape (paper, section 5.1), and what is cheaper sees
more text; the transformer over bytes is as narrow as makes its bytes cost what those of BPE do.
Three seeds of most families at the smallest budget. The entropy model's FLOPs are listed, and not
part of a budget.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.studies import pages, study
from benchmarks.studies.points import Point, account, width_for, with_flops, with_settings
from benchmarks.studies.shared import Shared

BUDGETS = {  # training FLOPs of a point at each level
    "laptop": (2.5e12, 7.1e12, 2e13),
    "gpu": (5e16, 1.41e17, 4e17),
    "pod": (1e20, 2.83e20, 8e20),
}
SEEDS = (3, 1, 1)  # at each level
FEW_SEEDS = (1, 1, 1)
FAMILIES = {
    "BLT entropy 4": SEEDS,
    "BLT entropy 6": SEEDS,
    "BLT entropy 8": SEEDS,
    "BLT space": SEEDS,
    "bytes": SEEDS,
    "bytes with tables": FEW_SEEDS,
    "BPE": SEEDS,
    "BPE with tables": SEEDS,
}


def plan(given: study.Settings) -> list[Point]:
    shared = study.prepare(given)
    return [
        with_seed(with_flops(family_point(shared, family, level), budget), seed)
        for level, budget in enumerate(BUDGETS[given.size])
        for seed in range(max(seeds[level] for seeds in FAMILIES.values()))
        for family, seeds in FAMILIES.items()
        if seed < seeds[level]
    ]


def family_point(shared: Shared, family: str, level: int) -> Point:
    name, about = f"{family.replace(' ', '_')}-{level}", dict(family=family)
    tables = family.endswith("with tables")
    if family.startswith("BPE"):
        return shared.tokens(name, level, tables=tables, **about)
    if family.startswith("bytes"):
        cost = account(shared.tokens(name, level)).model["total"]
        return width_for(
            lambda dim: shared.tokens(name, level, dim, bytes_only=True, tables=tables, **about),
            cost,
        )
    _, rule, *target = family.split()
    return shared.blt(name, level, rule=rule, target=float(target[0]) if target else None, **about)


def with_seed(point: Point, seed: int) -> Point:
    """Another start, and another order of the text; what is held out stays."""
    settings = {f"{point.training}.seed": 42 + seed, "data.seed": seed}
    point = with_settings(point, settings)
    return point._replace(name=f"{point.name}-{seed}", about=point.about | dict(seed=seed))


def report(rows: Sequence[dict], out: Path):
    """curves.png and README.md of the rows of results.csv."""
    found = summary(rows)
    series = {
        family: [(p["training_flops"], p["bits_per_byte"], p["deviation"] or 0) for p in points]
        for family, points in found.items()
    }
    pages.curves(out / "curves.png", series, "training FLOPs", "bits per byte, held out")
    slopes = [dict(family=f, points=len(p), slope=slope(p)) for f, p in found.items()]
    means = [point for points in found.values() for point in points]
    pages.write_page(
        out / "README.md",
        "Bits per byte against training FLOPs",
        "![bits per byte against training FLOPs](curves.png)",
        pages.table(
            means,
            dict(family="", level="", seeds="", deviation=".4f") | pages.QUALITY | pages.COST,
        ),
        "Error bars and `deviation` are standard deviations over seeds, where there are several. "
        "`slope` is of the straight line, by least squares, of log(bits per byte) over "
        "log(training FLOPs): -0.05 means that twice the FLOPs take 3.4% of the bits.",
        pages.table(slopes, dict(family="", points="", slope=".4f")),
        *seen(found),
    )


def summary(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """family -> a mean row for each level, with `seeds` and `deviation`."""
    found = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        for level in sorted({row["level"] for row in own}):
            several = [row for row in own if row["level"] == level]
            bits = [row["bits_per_byte"] for row in several]
            deviation = float(np.std(bits, ddof=1)) if len(bits) > 1 else None
            mean = {
                name: float(np.mean([row[name] for row in several]))
                for name in (
                    "bits_per_byte",
                    "median_source",
                    "training_flops",
                    "training_bytes",
                    "patch_bytes",
                )
            }
            point = several[0] | mean | dict(seeds=len(several), deviation=deviation)
            found.setdefault(family, []).append(point)
    return found


def slope(points: Sequence[dict]) -> float | None:
    """Of log(bits per byte) over log(training FLOPs); None of a single point."""
    if len(points) < 2:
        return None
    logs = [np.log([p[name] for p in points]) for name in ("training_flops", "bits_per_byte")]
    return float(np.polyfit(*logs, 1)[0])


def seen(found: dict[str, list[dict]]) -> list[str]:
    """A sentence for each budget: the families from best to worst."""
    sentences = []
    for level in sorted({p["level"] for points in found.values() for p in points}):
        at = sorted(
            (p["bits_per_byte"], f) for f, own in found.items() for p in own if p["level"] == level
        )
        ranked = ", ".join(f"{family} {bits:.4f}" for bits, family in at)
        sentences.append(f"At level {level}, from best to worst: {ranked}.")
    return sentences


if __name__ == "__main__":
    study.main(plan, report)
