"""The largest published size on one H100, compiled where there is none: minutes of a compiler."""

import json
import subprocess
import sys

import pytest

from bltjax.costs.chips import GIB
from bltjax.costs.hlo_text import computations, dimensions
from tests import processes

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("cuda_plugin")]

LAYERS, CONDITIONS = 1 + 25 + 9, 3  # of all stacks; passes of a step: forward, again, backward
ONE_GPU = ["--config.mesh.fsdp=1", "--config.blt_training.accumulation_steps=1"]
ONE_GPU += ["--config.blt_training.batch_size=8", "--config.blt_training.row_bytes=8192"]
ONE_GPU += ["--config.blt_training.optimizer.hash_updates=touched"]


def compiled(tmp_path, *arguments):
    """Returns the report of `bltjax aot`, and the instructions of the program."""
    text = tmp_path / "program.hlo"
    command = [sys.executable, "-m", "bltjax.aot", "--config=blt_1b", "--topology=h100:1x1x1"]
    process = subprocess.run(
        [*command, *ONE_GPU, f"--text={text}", *arguments],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    instructions = [ins for _, _, body in computations(text.read_text()) for ins in body.values()]
    return found, instructions


def test_a_training_step(tmp_path):
    """Released tables, 64 KiB of text: it fits, and cuDNN attends, forward twice and backward."""
    found, instructions = compiled(tmp_path)
    launches = found["launches"]
    assert launches["kernels"] + launches["copies"] <= 8000
    assert launches["host_syncs"] == LAYERS * CONDITIONS  # whether cuDNN takes the documents
    forward, backward = (
        launches["library_calls"][f"__cudnn$fmhaSoftmax{end}"] for end in ("", "Backward")
    )
    assert (forward, backward) == (2 * LAYERS, LAYERS)
    assert found["unknown_loops"] == []
    assert found["peak_bytes_per_chip"] <= 72 * GIB
    assert any(ins.opcode == "conditional" for ins in instructions)


def test_writing_a_byte(tmp_path):
    """One row: nothing large is copied, and only the loop itself is open."""
    found, instructions = compiled(tmp_path, "--program=decode")
    assert found["launches"]["byte"] <= 320
    loops = [ins for ins in instructions if ins.opcode == "while"]
    assert len([ins for ins in loops if "known_trip_count" not in ins.text]) == 1
    copies = [ins for ins in instructions if ins.opcode.removesuffix("-start") == "copy"]
    for copy in copies:
        sizes = [n for n in dimensions(copy.shape) if n > 1]
        assert len(sizes) < 2, copy  # matrices and caches have several
