"""The points of a study: training runs with their FLOPs, several at a time, kept when finished.

A point is a run directory. One with a result.json is finished and never run again; another goes on
where it stopped, as the trainer does.
"""

import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.flops import RunFlops, run_flops
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import RunConfig, read_config
from bltjax.costs.flops import TRAINING_FACTOR

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "studies"
WARMUP = 0.05  # of the steps
POLL_SECONDS = 0.5
STARTING_SECONDS = 45  # of a point, about: imports, compilation, evaluation


class Point(NamedTuple):
    """A run: a config of configs/studies/ with its arguments, and settings on top of it."""

    name: str  # of its directory
    config: str  # such as "blt.py:laptop,level=0"
    patch_bytes: float  # mean bytes of a patch or a token, as far as they are known before
    settings: dict  # "blt_training.steps" -> value
    about: dict  # what tells it from other points, for tables and plots

    @property
    def stage(self) -> str:
        return "token_model" if self.config.startswith("tokens.py") else "blt"

    @property
    def training(self) -> str:
        return "token_training" if self.stage == "token_model" else "blt_training"


def run_config(point: Point) -> RunConfig:
    """The settings of a point as its process reads them. Raises ValueError, KeyError."""
    return read_config(CONFIGS / point.config, point.settings)


def account(point: Point) -> RunFlops:
    return run_flops(run_config(point), point.patch_bytes)


def with_steps(point: Point, steps: int) -> Point:
    warmup = max(1, round(WARMUP * steps))
    return with_settings(
        point, {"steps": steps, "optimizer.warmup_steps": warmup}, prefix=f"{point.training}."
    )


def with_settings(point: Point, settings: dict, prefix: str = "") -> Point:
    more = {prefix + name: value for name, value in settings.items()}
    return point._replace(settings=point.settings | more)


def with_bytes(point: Point, num_bytes: float) -> Point:
    """The point trained on about so many bytes."""
    one = account(with_steps(point, 1))
    return with_steps(point, max(1, round(num_bytes / one.num_bytes)))


def with_flops(point: Point, budget: float) -> Point:
    """The point trained for about so many FLOPs, those of the model alone."""
    return with_bytes(point, budget / TRAINING_FACTOR / account(point).model["total"])


def width_for(make, flops_per_byte: float) -> Point:
    """make(dim) of the trunk's width whose forward FLOPs per byte come nearest.

    Widths are multiples of 8, which shards of a large one take, and give heads an even width.
    """
    config, stage = run_config(make(None)), make(None).stage
    trunk = config.token_model.transformer if stage != "blt" else config.blt.global_transformer
    step, low, high = math.lcm(2 * trunk.num_heads, 8), 1, 2
    while account(make(high * step)).model["total"] < flops_per_byte:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if account(make(middle * step)).model["total"] < flops_per_byte:
            low = middle
        else:
            high = middle
    both = [make(width * step) for width in (low, high)]
    return min(both, key=lambda point: abs(account(point).model["total"] - flops_per_byte))


def command(point: Point, directory: Path) -> list[str]:
    """What runs a point."""
    given = [f"--config.{name}={_text(value)}" for name, value in point.settings.items()]
    config = f"--config={CONFIGS}/{point.config}"
    workdir = f"--workdir={directory / point.name}"
    return [sys.executable, "-m", "bltjax.train", config, workdir, *given]


def _text(value) -> str:
    return repr(value) if isinstance(value, tuple) else str(value)


def environment(directory: Path) -> dict:
    """Of all processes of a study: points of one shape are compiled once."""
    cache = str(directory.absolute() / "compiled")
    return dict(os.environ, PYTHONPATH=_with_root()) | dict(
        JAX_COMPILATION_CACHE_DIR=os.environ.get("JAX_COMPILATION_CACHE_DIR", cache)
    )


def _with_root() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def is_finished(point: Point, directory: Path) -> bool:
    return RunDirectory(directory / point.name).result.exists()


def run(points: list[Point], directory: Path, jobs: int) -> list[str]:
    """Runs what is not finished, `jobs` at a time, each on its share of the cores.

    Several of these may work in one directory: a point that another one runs is waited for. Returns
    the names of the points that failed; their output is in NAME.log. A signal stops all of them,
    and what they have is saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shares = [cores[i::jobs] for i in range(jobs)] if (cores := _cores()) else [None] * jobs
    shares = [own or cores for own in shares]
    running, failed, started = {}, set(), time.monotonic()
    try:
        while True:
            left = [p for p in points if not is_finished(p, directory) and p.name not in failed]
            for point in left:
                free = [i for i in range(jobs) if i not in running]
                if not free:
                    break
                if point not in (p for p, *_ in running.values()):
                    job = _start(point, directory, shares[free[0]])
                    running |= {free[0]: job} if job else {}
            if not left and not running:
                return sorted(failed)
            time.sleep(POLL_SECONDS)
            for i, (point, process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[i]
                if process.returncode or not is_finished(point, directory):
                    failed.add(point.name)
                unfinished = sum(not is_finished(p, directory) for p in points) - len(failed)
                _tell(point, directory, time.monotonic() - since, unfinished, started)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def _start(point: Point, directory: Path, cores: list[int] | None):
    """(point, its process, time); None where another process runs it, or has just done so."""
    # The lock is handed on to the process: it holds as long as that lives, whoever started it.
    lock = os.open(directory / f"{point.name}.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = is_finished(point, directory)  # by another, since we asked
    except BlockingIOError:
        held = True
    if held:
        os.close(lock)
        return None
    with (directory / f"{point.name}.log").open("ab") as log:
        process = subprocess.Popen(
            command(point, directory),
            cwd=ROOT,
            env=environment(directory),
            stdout=log,
            stderr=log,
            pass_fds=[lock],
        )
    os.close(lock)
    if cores is not None:  # before it counts them
        os.sched_setaffinity(process.pid, cores)
    return point, process, time.monotonic()


def _cores() -> list[int] | None:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _tell(point: Point, directory: Path, seconds: float, left: int, started: float):
    said = "failed, see its log"
    if is_finished(point, directory):
        result = json.loads(RunDirectory(directory / point.name).result.read_text())
        said = f"{result['bits_per_byte']:.4f} bits per byte"
    minutes = (time.monotonic() - started) / 60
    so_far = f"{left} left after {minutes:.1f} min"
    print(f"{point.name}: {said} in {seconds:.0f} s; {so_far}", flush=True)


def read(point: Point, directory: Path) -> dict | None:
    """A finished point as a row of a table: settings, cost and quality; None of another."""
    if not is_finished(point, directory):
        return None
    run = RunDirectory(directory / point.name)
    result = json.loads(run.result.read_text())
    patch_bytes = result.get("mean_token_bytes") or result["mean_patch_bytes"]
    flops = account(point._replace(patch_bytes=patch_bytes))
    parameters = result["parameters"][point.stage]
    last = json.loads(run.metrics(point.stage).read_text().splitlines()[-1])
    return dict(
        name=point.name,
        **point.about,
        bits_per_byte=result["bits_per_byte"],
        # Unlike the mean, not moved by one source of scripts that a model never saw.
        median_source=statistics.median(s["bits_per_byte"] for s in result["sources"].values()),
        # None of models without patches, and of runs that were finished before it was measured.
        patch_use=result.get("patch_use", {}).get("zeroed"),
        entropy_model_bits_per_byte=result.get("entropy_model", {}).get("bits_per_byte"),
        training_flops=flops.training,
        flops_per_byte=flops.model["total"],
        paper_flops_per_byte=flops.paper,
        entropy_model_flops_per_byte=flops.entropy_model,
        entropy_model_training_flops=flops.entropy_training,
        patch_bytes=patch_bytes,
        training_bytes=sum(v for k, v in last.items() if k.startswith("bytes_seen/")),
        parameters=parameters["total"],
        parameters_without_hash_tables=parameters["without_hash_tables"],
        validation_bytes=result["validation_bytes"],
        seconds=result["seconds"],
    )


def print_plan(points: list[Point], directory: Path, jobs: int, flops_per_second: float):
    """What the points would cost, as a table and a JSON line with their commands."""
    import jax  # late: a study may run without, its points have their own

    from bltjax import sharding
    from bltjax.costs.flops import parameter_report
    from bltjax.model import functional

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    planned, total = [], 0.0
    print(f"{'point':28}{'TFLOPs':>12}{'MFLOP/byte':>12}{'MB':>9}{'M params':>10}{'s':>9}")
    for point in points:
        config, flops = run_config(point), account(point)
        model = config.trained(point.stage)[0]
        with jax.set_mesh(mesh):
            parameters = parameter_report(model, functional.abstract_params(model))
        seconds = flops.training / flops_per_second + STARTING_SECONDS
        total += seconds
        print(
            f"{point.name:28}{flops.training / 1e12:>12.4g}{flops.model['total'] / 1e6:>12.4g}"
            f"{flops.num_bytes / 1e6:>9.4g}{parameters['without_hash_tables'] / 1e6:>10.3g}"
            f"{seconds:>9.0f}"
        )
        planned.append(
            dict(
                name=point.name,
                **point.about,
                training_flops=flops.training,
                flops_per_byte=flops.model["total"],
                entropy_model_flops_per_byte=flops.entropy_model,
                bytes=flops.num_bytes,
                parameters=parameters,
                seconds=seconds,
                command=command(point, directory),
            )
        )
    print(f"{len(points)} points, about {total / jobs / 60:.0f} min with {jobs} at a time")
    print(json.dumps(dict(points=planned, seconds=total / jobs)))
