"""How to train a small BLT: `python -m benchmarks.studies.recipe --workdir=DIR`.

A recipe and one change of it at a time, on equal bytes: rates by part, decay, warm-up, batches,
windows, layers, patches, tables, and what the decoder starts from. Beside bits per byte stands how
much a model uses its patches, since a small one may do without them. Then widths: which rate is
best at each, and so by what rule rates go with the width.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies import pages, study
from benchmarks.studies.points import Point, run_config, with_bytes, with_settings
from benchmarks.studies.shared import Shared

TRAINING_BYTES = {"laptop": 1.2e6, "gpu": 1e9, "pod": 1e11}
PATCH = 4.5
BASELINE = "recipe"
OPTIMIZER = "blt_training.optimizer."
RATE = {"laptop": 7e-3, "gpu": 2e-3, "pod": 1e-3}
RECIPE = {  # beside the rate
    f"{OPTIMIZER}matrices": "muon",
    f"{OPTIMIZER}local_rate": 0.5,
    f"{OPTIMIZER}hash_rate": 2.5,
    "blt.hash.sizes": (2, 3, 4, 5),
    "blt.hash.initial_rows": "zeros",
}
ADAM = {f"{OPTIMIZER}matrices": "adam"}
LOCAL = "blt.local_encoder.", "blt.local_decoder."
CHANGES = {  # group -> change -> settings; "rate" is a multiple of the recipe's
    "before": {
        "one rate": ADAM
        | {"rate": 1.5, f"{OPTIMIZER}hash_rate": 1.0, f"{OPTIMIZER}local_rate": 1.0}
        | {"blt.hash.sizes": (3, 4, 5, 6, 7, 8), "blt.hash.initial_rows": "normal"},
        "Adam": ADAM,
        "Adam, half": ADAM | {"rate": 0.5, f"{OPTIMIZER}hash_rate": 5.0},
    },
    "rates": {
        "half": {"rate": 0.5},
        "double": {"rate": 2, f"{OPTIMIZER}hash_rate": 1.25},
        "tables half": {f"{OPTIMIZER}hash_rate": 1.25},
        "tables double": {f"{OPTIMIZER}hash_rate": 5.0},
        "local double": {f"{OPTIMIZER}local_rate": 1.0},
        "local half": {f"{OPTIMIZER}local_rate": 0.25},
        "global double": {f"{OPTIMIZER}global_rate": 2.0},
    },
    "decay": {
        "0.3": {f"{OPTIMIZER}weight_decay": 0.3},
        "1": {f"{OPTIMIZER}weight_decay": 1.0},
        "none of tables": {f"{OPTIMIZER}decay_hash_tables": False},
    },
    "batch": {
        "4 rows": {"blt_training.batch_size": 4},
        "8 rows": {"blt_training.batch_size": 8},
        "8 rows of 256": {"blt_training.batch_size": 8, "blt_training.row_bytes": 256},
    },
    "decoder": {
        "skip projection": {"blt.skip_projection": True},
        "no doubled residual": {"blt.cross_attention.doubled_residual": False},
        "windows of 16": {f"{stack}window": 16 for stack in LOCAL},
        "decoder's window 16": {"blt.local_decoder.window": 16},
        "k 4": {"blt.cross_attention.k": 4},
    },
    "layers": {
        "decoder 1": {"blt.local_decoder.num_layers": 1},
        "global 4": {"blt.global_transformer.num_layers": 4},
    },
    "patches": {
        f"{size:g} bytes": {"patching.target_patch_bytes": size} for size in (3.5, 6.0, 8.0)
    },
    "tables": {
        "32,768 rows": {"blt.hash.vocab": 32_768},
        "sizes 3 to 8": {"blt.hash.sizes": (3, 4, 5, 6, 7, 8)},
        "sizes 3 to 6": {"blt.hash.sizes": (3, 4, 5, 6)},
        "not from zero": {"blt.hash.initial_rows": "normal"},
        "no tables": {"blt.hash.sizes": ()},
    },
}
# Of the local stacks; the global one has its proportion to them, heads keep their width.
WIDTHS = {"laptop": (32, 64, 128), "gpu": (128, 256, 512), "pod": (384, 768, 1536)}
RATES = 0.5, 1, 2  # multiples of the recipe's


def plan(given: study.Settings) -> list[Point]:
    shared, size = study.prepare(given), given.size
    baseline = shared.blt(BASELINE, target=PATCH, group=BASELINE, change=BASELINE)
    baseline = with_settings(baseline, with_rate(RECIPE, size, 1))
    found = [baseline]
    for group, changes in CHANGES.items():
        found += [changed(baseline, group, change, of, size) for change, of in changes.items()]
    widths = [of_width(shared, width, times) for width in WIDTHS[size] for times in RATES]
    found = [with_bytes(point, TRAINING_BYTES[size]) for point in found + widths]
    name = f"{OPTIMIZER}warmup_steps"
    warm_up = {name: 3 * found[0].settings[name]}
    return [*found, changed(found[0], "warm-up", "three times as long", warm_up, size)]


def with_rate(settings: dict, size: str, times: float) -> dict:
    """Settings with a multiple of the recipe's learning rate."""
    return settings | {f"{OPTIMIZER}learning_rate": times * RATE[size]}


def changed(baseline: Point, group: str, change: str, settings: dict, size: str) -> Point:
    """The baseline with other settings, named by them."""
    name = f"{group}-{change}".replace(" ", "_").replace(",", "").replace("'", "")
    if "rate" in settings:
        others = {key: value for key, value in settings.items() if key != "rate"}
        settings = with_rate(others, size, settings["rate"])
    patch_bytes = settings.get("patching.target_patch_bytes", baseline.patch_bytes)
    point = baseline._replace(name=name, patch_bytes=patch_bytes)
    return with_settings(point._replace(about=dict(group=group, change=change)), settings)


def of_width(shared: Shared, width: int, times: float) -> Point:
    """The recipe with local stacks of a width, and a multiple of its rate."""
    rate = times * RATE[shared.size]
    about = dict(group="widths", change=f"{width}, rate {rate:g}", width=width, rate=rate)
    point = shared.blt(f"width-{width}-{rate:g}", target=PATCH, **about)
    model = run_config(point).blt
    local, trunk = model.local_encoder, model.global_transformer
    heads = max(1, width * local.num_heads // local.dim)
    stacks = {f"{stack}dim": width for stack in LOCAL} | {
        f"{stack}num_heads": heads for stack in LOCAL
    }
    trunk_width = width * trunk.dim // local.dim
    stacks |= {
        "blt.cross_attention.num_heads": heads,
        "blt.global_transformer.dim": trunk_width,
        "blt.global_transformer.num_heads": trunk_width * trunk.num_heads // trunk.dim,
    }
    return with_settings(point, with_rate(RECIPE | stacks, shared.size, times))


def report(rows: Sequence[dict], out: Path):
    """changes.png, use.png, widths.png and README.md of the rows of results.csv."""
    base = next((row for row in rows if row["group"] == BASELINE), None)
    if base is None:
        raise ValueError("the recipe has not finished: look into its log, and run again")
    for row in rows:
        row["change_in_bits"] = row["bits_per_byte"] - base["bits_per_byte"]
    others = [row for row in rows if row is not base and row["group"] != "widths"]
    widths = [row for row in rows if row["group"] == "widths"]
    pictures = []
    for name, key, says in (
        ("changes", "change_in_bits", f"bits per byte beside {base['bits_per_byte']:.3f}"),
        ("use", "patch_use", f"patch use; the recipe's is {base['patch_use']:.3f}"),
    ):
        groups = {}
        for row in others:
            groups.setdefault(row["group"], {})[row["change"]] = row[key]
        if groups:
            pages.changes(out / f"{name}.png", groups, says)
            pictures.append(f"![{says}]({name}.png)")
    if widths:
        lines = {}
        for row in widths:
            point = row["rate"], row["bits_per_byte"], 0
            lines.setdefault(f"width {row['width']}", []).append(point)
        pages.curves(out / "widths.png", lines, "learning rate", "bits per byte, held out")
        pictures.append("![bits per byte of each width and rate](widths.png)")
    columns = dict(group="", change="", change_in_bits="+.4f", patch_use=".4f")
    pages.write_page(
        out / "README.md",
        "A recipe for small models",
        *pictures,
        pages.table(rows, columns | pages.QUALITY | pages.COST),
        f"All read {base['training_bytes'] / 1e6:.2f} MB. One seed each: differences below the "
        "deviation over seeds that the study of scaling shows say nothing.",
        *seen(base, others, widths),
    )


def seen(base: dict, others: Sequence[dict], widths: Sequence[dict]) -> list[str]:
    """A sentence for each group, from best to worst, and one for the best rate of each width."""
    sentences = []
    for group in dict.fromkeys(row["group"] for row in others):
        own = [base, *(row for row in others if row["group"] == group)]
        ranked = sorted(own, key=lambda row: row["bits_per_byte"])
        said = ", ".join(
            f"{row['change']} {row['bits_per_byte']:.4f} (use {row['patch_use']:.3f})"
            for row in ranked
        )
        sentences.append(f"{group.capitalize()}, from best to worst: {said}.")
    best = {}
    for row in sorted(widths, key=lambda row: -row["bits_per_byte"]):
        best[row["width"]] = row["rate"]
    if best:
        told = ", ".join(f"{rate:g} at width {width}" for width, rate in sorted(best.items()))
        sentences.append(f"The best of these rates is {told}.")
    return sentences


if __name__ == "__main__":
    study.main(plan, report)
