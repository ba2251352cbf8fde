"""Chip-hours and money that the stages of a run take: arithmetic on FLOPs, no measurement.

Chip-hours are the FLOPs that the models need, over a stated share of the peak that a data sheet
gives (model-FLOP utilisation). Evaluation, compilation, checkpoints and interruptions are left out.
"""

import math
from typing import NamedTuple

from bltjax.config import TRAINING, RunConfig
from bltjax.costs.chips import CHIPS
from bltjax.costs.flops import TRAINING_FACTOR, flops_per_byte
from bltjax.costs.memory_plan import mean_patch_bytes
from bltjax.patching.boundaries import needs_entropies
from bltjax.training.block_diffusion import blocks_per_byte

ASSUMED_MFU = 0.3  # where none is given


class StageWork(NamedTuple):
    """The work of a stage."""

    num_bytes: float  # of text that it reads, more than once if it must
    flops_per_byte: float  # forward and, where it trains, backward; nothing that is recomputed
    steps: int | None  # of training

    def chip_hours(self, chip: str, mfu: float) -> float:
        """Returns the hours of one chip of `CHIPS` at a share `mfu` of its bfloat16 peak."""
        return self.num_bytes * self.flops_per_byte / (mfu * CHIPS[chip].flops) / 3600


def work_of_stages(config: RunConfig, num_bytes: float | None = None) -> dict[str, StageWork]:
    """Returns the work of each stage of a run that takes long.

    num_bytes: text that models are trained on, None: as many as the steps of the config read. The
    entropy model gets no more than its own steps read, since it stays small. Entropies are counted
    as if no text were read twice.
    """
    found = {s: _training(config, s, num_bytes) for s in TRAINING if s in config.stages}
    if "blt" in found and needs_entropies(config.patching):
        own = found["blt"].num_bytes
        forward = _forward(config, "entropy_model")
        found["entropies"] = StageWork(own, forward, None)
    return {name: found[name] for name in (*config.stages, "entropies") if name in found}


def _training(config: RunConfig, stage: str, num_bytes: float | None) -> StageWork:
    _, training = config.trained(stage)
    a_step = training.batch_size * _row_bytes(config, stage)
    configured = training.steps * a_step
    if num_bytes is None:
        num_bytes = configured
    elif stage == "entropy_model":
        num_bytes = min(num_bytes, configured)
    per_byte = TRAINING_FACTOR * _forward(config, stage, trains=True)
    return StageWork(num_bytes, per_byte, math.ceil(num_bytes / a_step))


def _forward(config: RunConfig, stage: str, trains: bool = False) -> float:
    """Returns the FLOPs per byte of a forward pass of a stage's model."""
    model, training = config.trained(stage)
    patch_bytes, row_bytes = mean_patch_bytes(config.patching), _row_bytes(config, stage)
    row_patches = training.row_patches or row_bytes / patch_bytes
    blocks = blocks_per_byte(model, training, row_bytes, row_patches) if trains else 0.0
    return flops_per_byte(model, row_bytes, patch_bytes, blocks)["total"]


def _row_bytes(config: RunConfig, stage: str) -> float:
    _, training = config.trained(stage)
    patch_bytes = mean_patch_bytes(config.patching)
    row_bytes = training.row_bytes or training.row_patches * patch_bytes
    return row_bytes * patch_bytes if stage == "token_model" else row_bytes  # they were tokens


def summary(work: dict[str, StageWork], chips: int, chip: str, mfu: float, price=None) -> dict:
    """Returns chip-hours by stage and in all, hours, and with the price of a chip-hour the cost."""
    by_stage = {name: w.chip_hours(chip, mfu) for name, w in work.items()}
    total = sum(by_stage.values())
    found = dict(chip=chip, mfu=mfu, stages=by_stage, chip_hours=total, hours=total / chips)
    return found if price is None else found | dict(price=price, cost=total * price)


def print_summary(work: dict[str, StageWork], found: dict, chips: int, assumed: bool):
    """Prints a `summary` and what it rests on; assumed: nobody gave the utilisation."""
    chip, mfu = found["chip"], found["mfu"]
    source = "an assumption, give --mfu" if assumed else "as given"
    peak = CHIPS[chip].flops / 1e12
    print(f"time on {chips} {chip}: arithmetic, at {mfu:.0%} of {peak:,.0f} TFLOP/s ({source})")
    for name, w in work.items():
        steps = f"{w.steps:,} steps" if w.steps else "forward only"
        print(
            f"  {name:18} {found['stages'][name]:12,.1f} chip-hours   {w.num_bytes:.3g} bytes x "
            f"{w.flops_per_byte:.3g} FLOPs, {steps}"
        )
    cost = f", {found['cost']:,.0f} at {found['price']:g} a chip-hour" if "cost" in found else ""
    hours = found["hours"]
    print(f"  {'together':18} {found['chip_hours']:12,.1f} chip-hours   {_duration(hours)}{cost}")


def _duration(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.1f} hours"
