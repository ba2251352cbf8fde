"""Real processes, really killed: the run ends as if nothing had happened, bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.commands.train import DIVERGED
from bltjax.config import RunConfig, from_config_dict
from bltjax.evaluation.patch_use import DISTURBED
from bltjax.runtime.signals import STOPPED
from tests import processes
from tests.processes import metrics, wait_for_step

pytestmark = pytest.mark.long  # one interpreter will do


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The training command on a small corpus; compilations are shared between its processes."""
    corpus = tmp_path_factory.mktemp("corpus")
    processes.write_corpus(corpus)

    def start(workdir, *settings, compile_anew=False):
        env = processes.environment()
        if compile_anew:
            env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return processes.start(
            "bltjax.train",
            "--config=tests/configs/tiny.py",
            f"--workdir={workdir}",
            f"--config.data.root={corpus}",
            *settings,
            env=env,
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


def parameters(workdir):
    from tests.configs.tiny import get_config

    config = from_config_dict(RunConfig, get_config())
    directory = RunDirectory(workdir)
    return {n: directory.stage(config, n).params() for n in ("entropy_model", "blt")}


def kill_after(process, workdir, stage, step):
    """SIGKILL once the stage has logged `step`."""
    wait_for_step([process], workdir, stage, step)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_the_last_line_reports_everything(uninterrupted):
    _, result = uninterrupted
    assert result["bits_per_byte"] > 0
    assert set(result["baselines"]) == {"order_0", "order_2", "order_3", "order_5", "xz"}
    assert result["compilations"] == dict(
        entropy_model=1, entropies=1, blt=1, evaluate=1, patch_use=1
    )
    use = result["patch_use"]
    assert 0 < use["bytes"] <= result["validation_bytes"] and abs(use["zeroed"]) > 0
    assert {*use} == {*DISTURBED, "bits_per_byte", "bytes"}
    assert 0 < result["entropy_model"]["bits_per_byte"] < 9
    assert abs(result["mean_patch_bytes"] - 4.5) < 0.5
    assert 0 < result["byte_utilisation"] <= 1 and 0 < result["patch_utilisation"] <= 1
    assert result["parameters"]["blt"]["total"] > result["parameters"]["blt"]["without_hash_tables"]
    assert result["seconds"] > 0


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
    for key in ("bits_per_byte", "threshold"):
        assert result[key] == whole_result[key], (key, steps)
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(whole))


def test_killed_while_it_learns_blocks(command, tmp_path):
    """Which blocks are drawn and masked depends on the seed and the step alone."""
    settings = [
        "--config.stages=('blt',)",
        "--config.patching.rule=space",
        "--config.blt.diffusion_block=3",
        "--config.blt_training.diffusion.masks=prefix",
        "--config.blt_training.diffusion.t_per=row",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = command(whole, *settings).communicate(timeout=300)[0]
    step = random.Random().randrange(5, 22)
    kill_after(command(killed, *settings), killed, "blt", step)
    process = command(killed, *settings)
    again = process.communicate(timeout=300)[0]
    assert process.returncode == 0, again
    assert "resumed at step" in again and "resumed" not in output, (step, output)
    lines = metrics(whole, "blt")
    assert len(lines) == 24 and len({line["block_loss"] for line in lines}) == 24
    assert metrics(killed, "blt") == lines, step
    found = []
    for workdir in (whole, killed):
        directory = RunDirectory(workdir)
        found.append(directory.stage(directory.config(), "blt").params())
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert found[0]["local_decoder"]["mask_embedding"]["weight"].any()


@pytest.mark.slow
def test_asked_to_stop_while_it_saves(command, uninterrupted, tmp_path):
    """By SIGTERM, then by Ctrl-C; it saves all the time."""
    whole, _ = uninterrupted
    workdir, stages = tmp_path / "stopped", "--config.stages=('blt',)"
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("blt"))
    for asked, step in ((signal.SIGTERM, 4), (signal.SIGINT, 12)):
        process = command(workdir, stages, "--config.blt_training.checkpoint_every=1")
        wait_for_step([process], workdir, "blt", step)
        process.send_signal(asked)
        output = process.communicate(timeout=100)[0]
        assert process.returncode == STOPPED, output
        names = [path.name for path in (workdir / "blt" / "checkpoints").iterdir()]
        saved = max(int(name) for name in names if name.isdigit())
        assert f"blt: stopped as asked, step {saved} of 24 is saved" in output.splitlines()[-1]
        assert saved > step and "Traceback" not in output
    process = command(workdir, stages)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert f"resumed at step {saved} of 24" in output
    assert metrics(workdir, "blt") == metrics(whole, "blt")
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(whole))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_while_it_compiles(command, tmp_path, number):
    """At a drawn moment from the first compilation on, where an exception may be swallowed."""
    workdir, moment = tmp_path / "compiling", random.uniform(0, 3)
    print(number.name, "after", moment, "seconds")
    process = command(workdir, compile_anew=True)
    read = []
    while not read or not read[-1].startswith("entropy_model: "):
        read.append(process.stdout.readline())
        assert read[-1], read
    time.sleep(moment)
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == STOPPED, output
    last = output.splitlines()[-1]
    names = [path.name for path in workdir.glob("*/checkpoints/*")]
    if saved := re.fullmatch(r"\w+: stopped as asked, step (\d+) of .* is saved: run .*", last):
        assert saved[1] in names, output
    else:
        assert last == f"stopped by {number.name}: run the same command again", output
        assert not names or "12" in names, output  # no stage had begun, or one was done


def test_a_damaged_checkpoint_is_trained_again(command, uninterrupted, tmp_path):
    whole, whole_result = uninterrupted
    workdir = tmp_path / "damaged"
    shutil.copytree(whole, workdir)
    newest = workdir / "blt" / "checkpoints" / "24"
    (newest / "state" / "manifest.ocdbt").unlink()

    # What only reads a model does not take an older one for it.
    process = command(workdir, "--config.stages=('evaluate',)")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    error = re.findall("error: .*", output)
    assert len(error) == 1 and f"checkpoint {newest} is damaged" in error[0], output
    assert "run its stage again: it goes on from step 20" in error[0]
    assert "Traceback" not in output and newest.is_dir()

    process = command(workdir)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert f"WARNING: checkpoint {newest} is damaged: NOT_FOUND: Error opening" in output
    assert "blt: resumed at step 20 of 24" in output and "Traceback" not in output
    assert (workdir / "blt" / "damaged" / "24" / "state").is_dir()
    assert metrics(workdir, "blt") == metrics(whole, "blt")
    assert json.loads(output.splitlines()[-1])["bits_per_byte"] == whole_result["bits_per_byte"]


def test_the_directory_of_another_run_is_refused_as_it_is(command, uninterrupted):
    whole, _ = uninterrupted
    process = command(whole, "--config.blt.pooling=mean")
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 2
    assert "config.blt.pooling: 'max' there, 'mean' here" in output
    assert json.loads((whole / "config.json").read_text())["config"]["blt"]["pooling"] == "max"


def test_a_loss_that_is_lost_has_its_own_exit_code(command, tmp_path):
    training = "--config.entropy_training."
    settings = [f"{training}optimizer.learning_rate=1e30", f"{training}checkpoint_every=1"]
    process = command(tmp_path / "lost", "--config.stages=('entropy_model',)", *settings)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == DIVERGED, output
    last = output.splitlines()[-1]
    assert re.match(r"error: entropy_model: loss \S+ and gradient norm \S+ at step \d+; ", last)
    assert re.search(r"the last good checkpoint is \S+/checkpoints/\d+; lower the learning", last)
