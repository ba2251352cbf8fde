"""What an accelerator makes of bltjax, in eight minutes: `python benchmarks/accelerator_check.py`.

For a machine with one GPU or TPU chip; nothing is downloaded. Writes a JSON line for each finding
to `findings.jsonl` in --out, and prints tables at the end. Stages run in the order of what they
teach. Each looks at the clock first, has a process and with it the device's memory to itself, and
may fail: that is a line too, and the next stage runs. What does not fit into --seconds is named at
the end, with the command that runs it.

    python benchmarks/accelerator_check.py --out=check
    python benchmarks/accelerator_check.py --out=check --stages=train:blt_1b:tiles,peers:train_1b

Stages, with their arguments:

    about                         versions and device
    ceilings                      what the device can do at most, with random data
    attention                     every backend: error against float32, speed, many documents
    train:MODEL:BACKEND[:REMAT]   the training step of blt_1b, large (130M) or entropy_100m
    generate:ROWS[:ROWS...]       blt_1b in bfloat16, beside the bound that bandwidth sets
    golden                        the numbers of the published code, in float32
    peers:WHAT                    train, train_1b or generate, beside `transformers`

--tiny makes everything as small as it goes, to try the check itself on a CPU. On TPUs the backends
are splash and tiles, and `transformers`, whose PyTorch has no TPU here, is left out.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1]))  # bltjax, where it is not installed

from accelerator.notes import DONE, FAILED, LATE, Notes, read_findings
from accelerator.tables import check_agreement, print_tables

from bltjax import cli

FILE = "findings.jsonl"
LONGEST = 3  # times its estimate, before a stage is taken for one that hangs
# A quarter of the memory is left alone otherwise.
MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"


class Stage(NamedTuple):
    """A kind of stage."""

    call: str  # module and function
    seconds: float  # that it needs on one H100, estimated
    group: str | None = None  # stages of a group that follow each other share a process


STAGES = {
    "about": Stage("ceilings.about", 10, "device"),
    "ceilings": Stage("ceilings.measure", 25, "device"),
    "attention": Stage("attention.measure", 60),
    "train": Stage("training.measure", 60),
    "generate": Stage("generation.measure", 60),
    "golden": Stage("golden_parity.measure", 25),
    "peers": Stage("peers.measure", 60),
}
DEFAULT = (
    "about",
    "ceilings",
    "attention",
    "train:blt_1b:auto",
    "generate:1:64",
    "golden",
    "peers:train",
    "train:large:auto",
    "train:large:tiles",
    "train:blt_1b:tiles",
    "train:large:mosaic",
    "peers:generate",
    "generate:8",
    "peers:train_1b",
)
TINY = (
    "about",
    "ceilings",
    "attention",
    "train:blt_1b:auto",
    "train:blt_1b:tiles",
    "generate:1:2",
    "golden",
    "peers:train",
)


def main(argv):
    cli.no_arguments(argv, "only flags are taken")
    chosen = flags.FLAGS
    stages = chosen.stages or list(TINY if chosen.tiny else DEFAULT)
    for stage in stages:
        if stage.partition(":")[0] not in STAGES:
            cli.fail(f"--stages holds {stage!r}: choose of {', '.join(STAGES)}")
    out = Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)
    started = chosen.started or time.time()
    if chosen.inside:
        run_here(stages, out / FILE, started)
    else:
        coordinate(stages, out / FILE, started)


def run_here(stages: list[str], file: Path, started: float):
    """Runs stages in this process, on its first device."""
    import jax

    from bltjax import sharding

    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        for stage in stages:
            name, *arguments = stage.split(":")
            notes = Notes(file, stage, started, flags.FLAGS.seconds, flags.FLAGS.tiny)
            module, function = STAGES[name].call.split(".")
            began = time.perf_counter()
            try:
                call = getattr(importlib.import_module(f"accelerator.{module}"), function)
                call(notes, *arguments)
            except Exception as error:
                notes.failed(error)
            notes.write(DONE, seconds=time.perf_counter() - began)
            jax.clear_caches()


def coordinate(stages: list[str], file: Path, started: float):
    """Runs each group of stages in a process of its own, then prints the tables."""
    file.unlink(missing_ok=True)
    name, value = MEMORY
    os.environ.setdefault(name, value)
    print(f"{name}={os.environ[name]} for every stage: set it for training and generation too")

    def note(stage):
        return Notes(file, stage, started, flags.FLAGS.seconds, flags.FLAGS.tiny)

    for group in grouped(stages):
        needed = sum(STAGES[stage.partition(":")[0]].seconds for stage in group)
        left = note(group[0]).left
        if left < needed / 2 and not flags.FLAGS.tiny:
            for stage in group:
                why = f"{left:.0f} s are left, it takes about {needed:.0f}"
                note(stage).late(why)
            continue
        problem = run_group(group, file.parent, started, min(left, LONGEST * needed))
        ended = {f["stage"] for f in read_findings(file) if f["kind"] == DONE}
        for stage in group:
            if stage not in ended:
                note(stage).write(FAILED, reason=problem)
    check_agreement(note("end"), read_findings(file))
    note("end").write(DONE, seconds=time.time() - started)
    findings = read_findings(file)
    print_tables(findings)
    undone = [f["stage"] for f in findings if f["kind"] == LATE]
    if undone := list(dict.fromkeys(undone)):
        command = f"python {' '.join(sys.argv[:1])} --out={flags.FLAGS.out}-more"
        print(f"\nleft out for want of time: {command} --stages={','.join(undone)}")
    print(f"\nfindings: {file}")


def grouped(stages: list[str]) -> list[list[str]]:
    """Splits stages into those that share a process."""
    groups, last = [], None
    for stage in stages:
        group = STAGES[stage.partition(":")[0]].group
        if group is not None and group == last:
            groups[-1].append(stage)
        else:
            groups.append([stage])
        last = group
    return groups


def run_group(stages: list[str], out: Path, started: float, seconds: float) -> str:
    """Runs stages in another process for so many seconds at most; returns what it ended with."""
    chosen = flags.FLAGS
    command = [sys.executable, __file__, "--inside", f"--out={out}", f"--started={started}"]
    command += [f"--stages={','.join(stages)}", f"--seconds={chosen.seconds}"]
    process = subprocess.Popen([*command, f"--tiny={chosen.tiny}"], start_new_session=True)
    try:
        code = process.wait(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s, which is all the time it had"
    finally:
        stop(process)
    return f"ended by signal {-code}, perhaps for want of memory" if code < 0 else f"ended, {code}"


def stop(process: subprocess.Popen):
    """Ends a process with those that it started; they may outlive it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def define_flags():
    out = os.environ.get("OUT", "accelerator_check")
    flags.DEFINE_string("out", out, "A directory for the findings.")
    flags.DEFINE_list("stages", [], "Which stages, in which order; default: what fits first.")
    flags.DEFINE_float("seconds", 480, "That all may take; what is running then is ended.", 1)
    flags.DEFINE_bool("tiny", False, "Everything as small as it goes, for CPUs.")
    flags.DEFINE_bool(
        "inside", False, "Run the stages in this process, for a profiler or debugger."
    )
    flags.DEFINE_float("started", None, "When the check began, in seconds since 1970.")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=cli.parse)
