"""A baseline and one change at a time: `python -m benchmarks.studies.ablations --workdir=DIR`.

What the paper's tables 7, 8 and 9 and figure 8 vary: cross-attention, hash n-grams, layers of the
local encoder and decoder, the entropy model; and the vectors of a patch and the patching rule. All
points read the same bytes; what they cost is in the table. Each entropy model makes records of its
own.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies import pages, study
from benchmarks.studies.points import Point, run_config, with_bytes, with_settings

TRAINING_BYTES = {"laptop": 1.4e6, "gpu": 1e9, "pod": 1e11}
PATCH = 4.5
BASELINE = "baseline"
TABLES = {"laptop": (1024, 65_536), "gpu": (10_000, 500_000), "pod": (100_000, 1_000_000)}
NO_CROSS_ATTENTION = {"blt.cross_attention.encoder": False, "blt.cross_attention.decoder": False}
CHANGES = {  # group -> change -> settings of the BLT
    "hash n-grams": {
        "none": {"blt.hash.sizes": ()},
        "3-5": {"blt.hash.sizes": (3, 4, 5)},
        "6-8": {"blt.hash.sizes": (6, 7, 8)},
    },
    "cross-attention": {
        "none": NO_CROSS_ATTENTION,
        "decoder": {"blt.cross_attention.encoder": False},
        "first decoder layer": {"blt.cross_attention.all_layers_decoder": False},
    },
    "vectors of a patch": {
        "k 1": {"blt.cross_attention.k": 1},
        "k 4": {"blt.cross_attention.k": 4},
    },
    "patching": {
        "space": {"patching.rule": "space"},
        "monotonic": {"patching.rule": "monotonic"},
        "static 4": {"patching.rule": "static", "patching.patch_size": 4},
    },
}
# (encoder, decoder) layers beside the baseline's; without n-grams too, as in table 9.
DEPTHS = {"laptop": ((2, 1),), "gpu": ((3, 2), (4, 1)), "pod": ((3, 5), (4, 4))}
ENTROPY_MODELS = {  # change -> settings of the entropy model
    "laptop": {
        "width 16": {"entropy_model.transformer.dim": 16},
        "width 128": {"entropy_model.transformer.dim": 128},
        "window 8": {"entropy_model.transformer.window": 8},
    },
    "gpu": {
        "width 64": {"entropy_model.transformer.dim": 64},
        "width 512": {"entropy_model.transformer.dim": 512},
        "window 64": {"entropy_model.transformer.window": 64},
        "window 128": {"entropy_model.transformer.window": 128},
    },
    "pod": {
        "width 96": {"entropy_model.transformer.dim": 96},
        "width 384": {"entropy_model.transformer.dim": 384},
        "window 64": {"entropy_model.transformer.window": 64},
        "window 128": {"entropy_model.transformer.window": 128},
    },
}


def plan(given: study.Settings) -> list[Point]:
    shared = study.prepare(given)
    baseline = shared.blt(BASELINE, target=PATCH, group=BASELINE, change=BASELINE)
    found = [baseline]
    for group, changes in (changes_of(given.size) | rates(baseline)).items():
        for change, settings in changes.items():
            found.append(changed(baseline, group, change, settings))
            rule = settings.get("patching.rule")
            if rule in ("space", "static"):
                patch = shared.space_bytes if rule == "space" else settings["patching.patch_size"]
                found[-1] = found[-1]._replace(patch_bytes=float(patch))
    for change, settings in ENTROPY_MODELS[given.size].items():
        own = study.prepare(given, f"shared-{change.replace(' ', '_')}", settings=settings)
        point = changed(baseline, "entropy model", change, settings)
        found.append(with_settings(point, {"data.records": own.records}))
    return [with_bytes(point, TRAINING_BYTES[given.size]) for point in found]


def changes_of(size: str) -> dict[str, dict[str, dict]]:
    """CHANGES with those that depend on the size of the models."""
    small, large = TABLES[size]
    tables = {f"{rows:,} rows": {"blt.hash.vocab": rows} for rows in (small, large)}
    depths = {}
    for encoder, decoder in DEPTHS[size]:
        layers = {
            "blt.local_encoder.num_layers": encoder,
            "blt.local_decoder.num_layers": decoder,
        }
        depths[f"{encoder} and {decoder}"] = layers
        depths[f"{encoder} and {decoder}, no n-grams"] = layers | {"blt.hash.sizes": ()}
    found = CHANGES | {"layers of encoder and decoder": depths}
    return found | {"hash n-grams": CHANGES["hash n-grams"] | tables}


def rates(baseline: Point) -> dict[str, dict[str, dict]]:
    """A lower rate, as models without cross-attention need to stay stable at laptop size."""
    rate = run_config(baseline).blt_training.optimizer.learning_rate
    lower = {"blt_training.optimizer.learning_rate": rate / 3}
    return {"rate": {"a third": lower, "a third, no cross-attention": lower | NO_CROSS_ATTENTION}}


def changed(baseline: Point, group: str, change: str, settings: dict) -> Point:
    name = f"{group}-{change}".replace(" ", "_").replace(",", "")
    about = dict(group=group, change=change)
    return with_settings(baseline._replace(name=name, about=about), settings)


def report(rows: Sequence[dict], out: Path):
    """changes.png and README.md of the rows of results.csv."""
    base = next((row for row in rows if row["group"] == BASELINE), None)
    if base is None:
        raise ValueError("the baseline has not finished: look into its log, and run again")
    for row in rows:
        row["change_in_bits"] = row["bits_per_byte"] - base["bits_per_byte"]
    groups = {}
    for row in (row for row in rows if row is not base):
        groups.setdefault(row["group"], {})[row["change"]] = row["change_in_bits"]
    if groups:
        says = f"bits per byte beside the baseline's {base['bits_per_byte']:.3f}"
        pages.changes(out / "changes.png", groups, says)
    pages.write_page(
        out / "README.md",
        "Ablations",
        *(["![bits per byte of each change](changes.png)"] if groups else []),
        pages.table(
            rows,
            dict(group="", change="", change_in_bits="+.4f") | pages.QUALITY | pages.COST,
        ),
        f"All read {base['training_bytes'] / 1e6:.2f} MB. One seed each: differences below the "
        "deviation over seeds that the study of scaling shows say nothing.",
        *seen(rows),
    )


def seen(rows: Sequence[dict]) -> list[str]:
    """A sentence for each group: from best to worst, the baseline among them."""
    base = next(row for row in rows if row["group"] == BASELINE)
    sentences = []
    for group in dict.fromkeys(row["group"] for row in rows if row is not base):
        own = [base, *(row for row in rows if row["group"] == group)]
        ranked = sorted(own, key=lambda row: row["bits_per_byte"])
        said = ", ".join(f"{row['change']} {row['bits_per_byte']:.4f}" for row in ranked)
        sentences.append(f"{group.capitalize()}, from best to worst: {said}.")
    return sentences


if __name__ == "__main__":
    study.main(plan, report)
