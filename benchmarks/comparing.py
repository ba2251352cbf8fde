"""One step of bltjax and of its peer: the same weights and batch, a process each, taking turns."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from absl import flags
from measuring import (
    OPTIMIZER,
    OURS,
    SIZES,
    THEIRS,
    Worker,
    WorkerError,
    alternate,
    define_step_flags,
    draw_batch,
    installed,
    median,
    parse_shape,
    print_result,
    print_table,
    settings,
    with_hash_updates,
)

from bltjax import cli
from bltjax.config import BLTConfig, OptimizerConfig, read_config
from bltjax.costs import flops

CLOSE = {"float32": 1e-3, "bfloat16": 3e-2}  # how far two losses may be apart
KEPT = dict(none="all", dots="results of linear layers and attention", full="inputs of layers")
COLUMNS = {
    "size": "",
    "shape": "",
    "who": "",
    "bytes/s": ",.0f",
    "step s": ".3f",
    "first s": ".1f",
    "peak MB": ",.0f",
    "of steps MB": ",.0f",
    "MFU": ".1%",
    "speed": ".2f",
    "memory": ".2f",
}


def define_flags():
    """Those of train_step.py and forward.py."""
    define_step_flags("all", ["4x1024", "1x8192"])
    flags.DEFINE_enum("against", None, [THEIRS], "Measure this too, in turns.")
    meaning = "A file of configs/ whose model is taken, not --size; --config.NAME=VALUE changes it."
    flags.DEFINE_string("config", None, meaning)
    flags.DEFINE_enum("attention", "sdpa", ["sdpa", "eager"], "Of the peer.")
    flags.DEFINE_bool("checkpointing", False, "The peer's gradient checkpointing.")
    flags.DEFINE_bool("apart", False, "One process after the other, where memory holds only one.")


def compare(benchmark: str, task: str):
    """Measures --shapes of --size and prints them; task: forward or train, see worker.py."""
    chosen, rows, versions = flags.FLAGS, [], {}
    if chosen.against and not (installed("torch") and installed("transformers")):
        cli.fail(f"--against={THEIRS} needs torch and transformers: make oracle installs them")
    shapes = {text: parse_shape(text) for text in chosen.shapes}
    try:
        for size, (model, optimizer) in models().items():
            with tempfile.TemporaryDirectory() as scratch:
                for text, shape in shapes.items():
                    found = measure(task, model, optimizer, shape, Path(scratch), versions)
                    rows += [{"size": size, "shape": text} | row for row in found]
                    print_table(COLUMNS, rows[-len(found) :])
    except WorkerError as error:
        cli.fail(error)
    print()
    print_table(COLUMNS, rows)
    names = "dtype", "remat", "hash_updates", "attention", "checkpointing", "apart"
    options = {n: chosen[n].value for n in names}
    print_result(benchmark, versions=versions, options=options, rows=rows)


def models() -> dict[str, tuple[BLTConfig, OptimizerConfig]]:
    """Models of the flags by name, and what they are trained with."""
    chosen = flags.FLAGS
    if chosen.config is None:
        names = ["small", "large"] if chosen.size == "all" else [chosen.size]
        found = {name: (SIZES[name], with_hash_updates(OPTIMIZER)) for name in names}
    else:
        run = read_config(chosen.config, cli.given_settings())
        # Without a schedule, so that both make the same updates.
        constant = dataclasses.replace(run.blt_training.optimizer, schedule="constant")
        found = {Path(chosen.config).stem: (run.blt, with_hash_updates(constant))}
    changes = dict(remat=chosen.remat, compute_dtype=chosen.dtype)
    return {n: (dataclasses.replace(m, **changes), o) for n, (m, o) in found.items()}


def measure(task, model, optimizer, shape, scratch: Path, versions: dict) -> list[dict]:
    """Rows of the table for one batch; adds to `versions`."""
    chosen = flags.FLAGS
    batch = draw_batch(*shape)
    np.savez(scratch / "batch.npz", **batch)

    def run(*names):
        with contextlib.ExitStack() as stack:
            workers = {n: stack.enter_context(Worker(n, chosen.threads)) for n in names}
            for worker in workers.values():
                build(worker, task, model, scratch, optimizer)
            return timed(workers)

    if not chosen.against:
        runs, failure = run(OURS), None
    elif chosen.apart:
        runs, failure = one_after_the_other(lambda: check_same_logits(model, scratch), run)
    else:
        check_same_logits(model, scratch)
        runs, failure = run(OURS, THEIRS), None
    if len(runs) == 2 and task == "train":
        check_same_losses(runs)
    for found in runs.values():
        versions |= found["about"]
    rows = [row(who, found, runs, task, model, batch) for who, found in runs.items()]
    if failure:
        print(failure)
        rows.append(dict(who=THEIRS, error=failure))
    return rows


def one_after_the_other(check, run) -> tuple[dict, str | None]:
    """(runs of both, None), or where the peer fails (ours, how it failed)."""
    failure = None
    try:
        check()
    except WorkerError as error:
        failure = str(error)
    runs = run(OURS)
    try:
        return (runs if failure else runs | run(THEIRS)), failure
    except WorkerError as error:
        return runs, str(error)


def build(worker: Worker, task: str, model, scratch: Path, optimizer=OPTIMIZER, precise=False):
    """Gets a worker ready for its first step."""
    chosen = flags.FLAGS
    shared = dict(
        task=task,
        batch=str(scratch / "batch.npz"),
        optimizer=settings(optimizer),
        precise=precise,
    )
    weights = scratch / "weights"
    if worker.kind == OURS:
        stored = str(weights) if weights.exists() else None
        worker.ask("build", model=settings(model), weights=stored, **shared)
    else:
        options = dict(attention=chosen.attention, checkpointing=chosen.checkpointing)
        options |= dict(directory=str(weights), dtype=model.compute_dtype)
        worker.ask("build", **options, **shared)


def check_same_logits(model, scratch: Path):
    """Exports the weights; ends the command unless both give the same logits, in float32, on
    devices of one kind."""
    model, found, platforms = dataclasses.replace(model, compute_dtype="float32"), {}, []
    for who in (OURS, THEIRS):
        with Worker(who, flags.FLAGS.threads) as worker:
            platforms.append(worker.ask("about")["platform"])
            check_same_platform(platforms)
            build(worker, "forward", model, scratch, precise=True)
            if who == OURS and not (scratch / "weights").exists():
                worker.ask("export", directory=str(scratch / "weights"))
            worker.ask("step")
            found[who] = np.array(worker.ask("logits_sample"))
    difference = np.abs(found[OURS] - found[THEIRS]).max()
    if not difference <= CLOSE["float32"]:
        cli.fail(
            f"logits differ by {difference:.2g}: the two do not compute the same, so "
            "nothing was timed"
        )
    print(f"logits of both differ by {difference:.1g} at most")


def check_same_platform(platforms: list[str]):
    """Ends the command unless all are the same; ours is the first."""
    if len(set(platforms)) > 1:
        cli.fail(
            f"{OURS} runs on {platforms[0]} and {THEIRS} on {platforms[1]}, which is no comparison:"
            " .venv/bin/pip install -e '.[cuda]' and a CUDA build of torch, or hide the GPU with "
            "CUDA_VISIBLE_DEVICES= JAX_PLATFORMS=cpu"
        )


def timed(workers: dict[str, Worker]) -> dict[str, dict]:
    """Two first steps of each, then --repeats of each in turns; what was measured of each."""
    first = alternate({who: lambda w=w: w.ask("step") for who, w in workers.items()}, 2)
    for worker in workers.values():
        worker.ask("forget_peak")
    later = alternate(
        {who: lambda w=w: w.ask("step") for who, w in workers.items()}, flags.FLAGS.repeats
    )
    return {
        who: dict(
            first_seconds=first[who][0]["seconds"],
            seconds=[step["seconds"] for step in later[who]],
            losses=[step.get("loss") for step in first[who]],
            memory=worker.ask("memory"),
            about=worker.ask("about"),
        )
        for who, worker in workers.items()
    }


def check_same_losses(runs: dict[str, dict]):
    """Ends the command unless the losses before and after the first update agree."""
    for number, pair in enumerate(zip(*(run["losses"] for run in runs.values()), strict=True)):
        if not abs(pair[0] - pair[1]) <= CLOSE[flags.FLAGS.dtype]:
            cli.fail(
                f"losses of step {number} are {pair[0]:.5f} and {pair[1]:.5f}: the two "
                "do not train the same, so the times mean nothing"
            )
    print(f"losses of both: {', '.join(str(run['losses']) for run in runs.values())}")


def row(who: str, run: dict, runs: dict, task: str, model, batch: dict) -> dict:
    rows, length = batch["tokens"].shape
    step = median(run["seconds"])
    memory = run["memory"]
    patch_bytes = (length + 1) / batch["patch_lengths"].shape[1]
    forwards = flops.TRAINING_FACTOR if task == "train" else 1
    model_flops = (
        forwards * rows * length * flops.flops_per_byte(model, length, patch_bytes)["total"]
    )
    found = {
        "who": who,
        "bytes/s": rows * length / step,
        "step s": step,
        "first s": run["first_seconds"],
        "peak MB": memory.get("device_peak", memory["peak"]) / 1e6,
        "seconds": run["seconds"],
        "losses": run["losses"],
        "memory_bytes": memory,
        "model_flops": model_flops,
    }
    if task == "train":
        theirs = "full" if flags.FLAGS.checkpointing else "none"
        found["kept for backward"] = KEPT[model.remat if who == OURS else theirs]
    if "device_peak" not in memory:
        found["of steps MB"] = memory["recent_peak"] / 1e6
    peak = runs[OURS]["about"].get("data_sheet_flops")
    if peak:
        found["MFU"] = model_flops / step / peak
    if who == OURS and len(runs) > 1:
        theirs = row(THEIRS, runs[THEIRS], runs, task, model, batch)
        found["speed"] = theirs["step s"] / step
        found["memory"] = found["peak MB"] / theirs["peak MB"]
    return found
