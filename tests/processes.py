"""Commands of the package as real processes."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process without PyTorch, with so many CPU devices.

    Conftest has all processes share compilations.
    """
    flags = re.sub(r"(platform_device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    return dict(os.environ, XLA_FLAGS=flags, PYTHONPATH=str(ROOT / "tests" / "without_torch"))


def start(module: str, *arguments, env: dict[str, str], stderr=subprocess.PIPE):
    """`python -m module arguments` in the repository's root, its output piped."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ended(run, timeout=240):
    """(exit code, stdout, stderr) of each process."""
    outputs = []
    for process in run:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for left in run:
                left.kill()
            raise
        outputs.append((process.returncode, out, err))
    return outputs


def write_corpus(directory: Path):
    """Twelve short texts."""
    directory.mkdir(exist_ok=True)
    words = random.Random(0)
    for number in range(12):
        text = " ".join(
            words.choices(["patch", "byte", "latent", "naïve", "日本", "x=1;\n"], k=250)
        )
        (directory / f"{number}.txt").write_text(text)


# Parts of the names of metrics that depend on the machine.
TIMING = ("_second", "seconds_", "_fraction", "flops_utilisation", "memory_bytes", "compilations")


def metrics(workdir: Path, stage: str) -> list[dict]:
    """The lines that a stage has logged, without what depends on the machine."""
    return [
        {k: v for k, v in json.loads(line).items() if not any(t in k for t in TIMING)}
        for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()
    ]


def wait_for_step(run: list[subprocess.Popen], workdir: Path, stage: str, step: int):
    """Until the processes of a run have logged a step of a stage, and all of them live."""
    path, deadline = workdir / stage / "metrics.jsonl", time.time() + 240
    while time.time() < deadline and all(process.poll() is None for process in run):
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError([process.communicate() for process in run if process.poll() is not None])
