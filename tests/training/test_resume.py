"""Real processes, really killed: the run ends as if nothing had happened, bit for bit."""

import json
import os
import random
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from bltjax.config import RunConfig, from_config_dict
from bltjax.recipe import blt_params, entropy_params
from tests import processes
from tests.processes import compiling_once

TIMING = ("bytes_per_second", "seconds_per_step", "data_wait_fraction")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The training command on a small corpus; compilations are shared between its processes."""
    corpus = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    for number in range(12):
        text = " ".join(
            words.choices(["patch", "byte", "latent", "naïve", "日本", "x=1;\n"], k=250)
        )
        (corpus / f"{number}.txt").write_text(text)
    environment = compiling_once(tmp_path_factory.mktemp("compiled"))

    def start(workdir, *settings):
        return processes.start(
            "bltjax.train",
            "--config=tests/configs/tiny.py",
            f"--workdir={workdir}",
            f"--config.data.root={corpus}",
            *settings,
            env=environment,
            stderr=subprocess.STDOUT,
        )

    return start


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    process = command(workdir)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return workdir, json.loads(output.splitlines()[-1])


def metrics(workdir, stage):
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def parameters(workdir):
    from tests.configs.tiny import get_config

    config = from_config_dict(RunConfig, get_config())
    return dict(entropy_model=entropy_params(config, workdir), blt=blt_params(config, workdir))


def kill_after(process, workdir, stage, step):
    """SIGKILL once the stage has logged `step`."""
    path, deadline = workdir / stage / "metrics.jsonl", time.time() + 240
    while time.time() < deadline and process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            break
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_the_last_line_reports_everything(uninterrupted):
    _, result = uninterrupted
    assert result["bits_per_byte"] > 0
    assert set(result["baselines"]) == {"order_0", "order_2", "order_3", "order_5", "xz"}
    assert result["compilations"] == dict(entropy_model=1, entropies=1, blt=1, evaluate=1)
    assert abs(result["mean_patch_bytes"] - 4.5) < 0.5
    assert 0 < result["byte_utilisation"] <= 1 and 0 < result["patch_utilisation"] <= 1
    assert result["parameters"]["blt"]["total"] > result["parameters"]["blt"]["without_hash_tables"]
    assert result["seconds"] > 0 and "".join(result["patches"]).startswith("Patches are short")


def test_killed_at_random_steps_and_run_again(command, uninterrupted, tmp_path):
    whole, whole_result = uninterrupted
    workdir, chance = tmp_path / "killed", random.Random()
    steps = chance.randrange(1, 11), chance.randrange(1, 23)
    print("killed after steps", steps)
    kill_after(command(workdir), workdir, "entropy_model", steps[0])
    kill_after(command(workdir), workdir, "blt", steps[1])
    process = command(workdir)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "resumed at step" in output or steps[1] < 4
    for stage in ("entropy_model", "blt"):
        assert metrics(workdir, stage) == metrics(whole, stage), steps
    result = json.loads(output.splitlines()[-1])
    for key in ("bits_per_byte", "threshold", "sample", "patches"):
        assert result[key] == whole_result[key], (key, steps)
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(whole))


def test_a_damaged_checkpoint_and_another_config_are_named_and_nothing_is_lost(
    command, uninterrupted
):
    whole, _ = uninterrupted
    newest = whole / "blt" / "checkpoints" / "24"
    damaged = newest / "state" / "manifest.ocdbt"
    before = {p: p.read_bytes() for p in (whole / "blt").rglob("*") if p.is_file()}
    damaged.unlink()
    process = command(whole)
    output = process.communicate(timeout=300)[0]
    damaged.write_bytes(before[damaged])
    assert process.returncode == 2, output
    error = re.findall("error: .*", output)
    assert len(error) == 1 and f"checkpoint {newest} cannot be read" in error[0], output
    assert "delete that directory to resume from step 20" in error[0]
    assert "Traceback" not in output
    assert before == {p: p.read_bytes() for p in (whole / "blt").rglob("*") if p.is_file()}

    # The directory of another run is refused as it is.
    process = command(whole, "--config.blt.pooling=mean")
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 2
    assert "config.blt.pooling: 'max' there, 'mean' here" in output
    assert json.loads((whole / "config.json").read_text())["config"]["blt"]["pooling"] == "max"
