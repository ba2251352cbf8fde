"""Blocks that a decoder fills in, one change at a time: `python -m benchmarks.studies.blocks ...`.

A BLT without blocks, one that also learns blocks of four bytes, and changes of that one: the size
of a block, the weight of its loss, which of its bytes are masked and their least share, the
patching rule. All read the same bytes. Told are bits per byte of next bytes beside those without
blocks, the loss of masked bytes and how much it varies between lines of metrics, the FLOPs of a
step; and of greedy text after the beginnings of held-out documents, written with verified drafts
(BLT-DV), the share of drafts that stood and bytes for each call of the global stack.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from absl import app

import bltjax
from benchmarks.studies import pages, study
from benchmarks.studies import shared as sharing
from benchmarks.studies.points import Point, run_config, with_bytes, with_settings
from benchmarks.studies.shared import Shared
from bltjax import cli
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.costs.flops import flops_per_byte
from bltjax.runtime.files import replacing
from bltjax.training.block_diffusion import blocks_per_byte

TRAINING_BYTES = {"laptop": 1.4e6, "gpu": 1e9, "pod": 1e11}
PATCH, BLOCK = 4.5, 4
PLAIN, BASELINE = "none", "blocks of 4"
SIZE, LOSS = "blt.diffusion_block", "blt_training.diffusion."
CHANGES = {  # group -> change -> settings beside those of the baseline
    "size": {"8 bytes": {SIZE: 8}, "16 bytes": {SIZE: 16}},
    "weight": {
        "0.03": {f"{LOSS}weight": 0.03},
        "0.3": {f"{LOSS}weight": 0.3},
        "1, as published": {f"{LOSS}weight": 1.0},
        # The loss of blocks is then a sum over their bytes, 16 for each patch, as published.
        "summed, 16 bytes": {f"{LOSS}weight": 16 / PATCH, SIZE: 16},
    },
    "masks": {"prefix": {f"{LOSS}masks": "prefix"}},
    "least share masked": {
        "0.001": {f"{LOSS}t_min": 0.001},
        "0.01": {f"{LOSS}t_min": 0.01},
        "0.5": {f"{LOSS}t_min": 0.5},
    },
    "patching": {
        "space": {"patching.rule": "space"},
        "static 4": {"patching.rule": "static", "patching.patch_size": 4},
        "falling": {"patching.rule": "falling"},
    },
}
DOCUMENTS, PROMPT, NEW, ROWS = 32, 128, 64, 8  # whose beginnings are written on; bytes; at once
DOCUMENT_BYTES = 1_000_000  # that they are taken from
LATE = 0.75  # of the steps, after which the loss of blocks is told
DRAFTS = dict(block_loss=".3f", block_loss_deviation=".3f", stood=".1%", bytes_per_call=".2f")


def plan(given: study.Settings, shared: Shared) -> list[Point]:
    plain = shared.blt(PLAIN, target=PATCH, group=PLAIN, change=PLAIN)
    plain = with_bytes(plain, TRAINING_BYTES[given.size])
    baseline = changed(plain, BASELINE, BASELINE, {SIZE: BLOCK})
    found = [plain, baseline]
    for group, changes in CHANGES.items():
        for change, settings in changes.items():
            point = changed(baseline, group, change, settings)
            rule = settings.get("patching.rule")
            if rule in ("space", "static"):
                own = dict(space=shared.space_bytes, static=settings.get("patching.patch_size"))
                point = point._replace(patch_bytes=float(own[rule]))
                del point.settings["patching.target_patch_bytes"]
            found.append(point)
    return found


def changed(point: Point, group: str, change: str, settings: dict) -> Point:
    name = f"{group}-{change}".replace(" ", "_").replace(",", "")
    return with_settings(
        point._replace(name=name, about=dict(group=group, change=change)), settings
    )


def training_flops_per_byte(point: Point) -> float:
    """Forward FLOPs of a training step for each byte of its rows, with those of blocks."""
    config = run_config(point)
    model, training = config.blt, config.blt_training
    length, patch = training.row_bytes, point.patch_bytes
    blocks = blocks_per_byte(model, training, length, training.row_patches or length / patch)
    return flops_per_byte(model, length, patch, blocks)["total"]


def measure(given: study.Settings, point: Point, shared: Shared) -> dict:
    """What a finished point makes of blocks, kept in its directory; of one without blocks its text.

    Raises ValueError where text with verified drafts is another than without.
    """
    run = RunDirectory(given.directory / "points" / point.name)
    path = run.path / "blocks.json"
    if path.exists():
        return json.loads(path.read_text())
    print(f"{point.name}: writing", flush=True)
    model = bltjax.load(run.path, entropy_model=shared.entropy_model)
    prompts = [text[:PROMPT] for text in sharing.held_out(shared, DOCUMENT_BYTES)[:DOCUMENTS]]
    found = dict(block_loss=None, block_loss_deviation=None, stood=None)
    plain, counts = model.generate_and_count(prompts, NEW, batch_size=ROWS)
    if size := model.config.diffusion_block:
        texts, counts = model.generate_and_count(prompts, NEW, batch_size=ROWS, blocks=size)
        if texts != plain:
            raise ValueError(f"{point.name}: text with verified drafts is another than without")
        found = late_losses(run) | dict(stood=counts.accepted / max(counts.drafted, 1))
    found |= dict(bytes_per_call=counts.new_bytes / max(counts.global_calls, 1))
    with replacing(path) as file:
        file.write(json.dumps(found).encode())
    return found


def late_losses(run: RunDirectory) -> dict:
    """The mean of the loss of blocks over the last lines of metrics, and its deviation."""
    lines = [json.loads(line) for line in run.metrics("blt").read_text().splitlines()]
    lines = [line for line in lines if "block_loss" in line]
    late = [x["block_loss"] for x in lines if x["step"] > LATE * lines[-1]["step"]]
    deviation = statistics.stdev(late) if len(late) > 1 else None
    return dict(block_loss=statistics.mean(late), block_loss_deviation=deviation)


def report(rows: Sequence[dict], out: Path):
    """changes.png, stood.png and README.md of the rows of results.csv."""
    by_group = {row["group"]: row for row in rows}
    if not {PLAIN, BASELINE} <= set(by_group):
        raise ValueError("the first two points have not finished: look into their logs, run again")
    plain, groups, stood = by_group[PLAIN], {}, {}
    for row in rows:
        row["change_in_bits"] = row["bits_per_byte"] - plain["bits_per_byte"]
        row["step_flops"] = row["step_flops_per_byte"] / row["flops_per_byte"]
        if row is not plain:
            groups.setdefault(row["group"], {})[row["change"]] = row["change_in_bits"]
            stood.setdefault(row["group"], {})[row["change"]] = 100 * row["stood"]
    says = f"bits per byte of next bytes beside {plain['bits_per_byte']:.3f} without blocks"
    pages.changes(out / "changes.png", groups, says)
    pages.bars(out / "stood.png", stood, "% of drafts that stood")
    columns = dict(group="", change="", bits_per_byte=".4f", change_in_bits="+.4f")
    columns |= DRAFTS | dict(step_flops=".2f", patch_bytes=".2f")
    pages.write_page(
        out / "README.md",
        "Blocks",
        "![bits per byte of each change](changes.png)",
        "![drafts that stood](stood.png)",
        pages.table(rows, columns),
        f"All read {plain['training_bytes'] / 1e6:.2f} MB, one seed each; other patching rules "
        "have other bits per byte without blocks too. `block loss`: nats of a masked byte, over "
        f"the last {1 - LATE:.0%} of the steps, and how much its means of some steps deviate. "
        "`stood`: of verified drafts, greedy. `step flops`: of a training step beside one without "
        "blocks.",
    )


def main(argv):
    study.check(argv)
    given = study.settings()
    with study.guarded():
        shared = study.prepare(given)
        planned = {point.name: point for point in plan(given, shared)}
        rows = study.carry_out(given, list(planned.values()))
        for row in rows:
            point = planned[row["name"]]
            row["step_flops_per_byte"] = training_flops_per_byte(point)
            row |= measure(given, point, shared)
        pages.write_csv(given.out / "results.csv", rows)
        report(rows, given.out)
        study.finish(given, rows)


if __name__ == "__main__":
    study.define_flags()
    app.run(main, flags_parser=cli.parse)
