"""Scripts of launch/ as processes, and fakes of the commands that they call."""

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SETTINGS = dict(
    PATH=os.environ["PATH"], HOME="/home/me", PYTHON="python3", PORT="12345", TMPDIR="/tmp"
)
POD = dict(NAME="pod", ZONE="us-east5-b", PROJECT="mine", ACCELERATOR_TYPE="v6e-64")
JOBSET = dict(
    NAME="blt", IMAGE="hub/blt:1", CLAIM="runs", ACCELERATOR="tpu-v6e-slice", TOPOLOGY="8x8"
)


def launch(script, *arguments, check=True, **settings):
    """The finished process of a script of launch/, with nothing of this machine's environment."""
    process = subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        cwd=ROOT,
        env={**SETTINGS, **settings},
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert not check or process.returncode == 0, process.stderr
    return process


def dry(script, *arguments, **settings) -> list[str]:
    """The lines that it prints with --dry-run."""
    return launch(script, "--dry-run", *arguments, **settings).stdout.splitlines()


def executable(path: Path, text: str) -> Path:
    """A Bash script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return path


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not happen within 20 seconds")


def refused(script, *arguments, **settings) -> str:
    """The one line that is said of a mistake."""
    process = launch(script, *arguments, check=False, **settings)
    assert process.returncode == 2 and not process.stdout
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    return process.stderr
