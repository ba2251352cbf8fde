"""Several real processes as one run: equal to one, killed, stopped, moved to other meshes."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bltjax import sharding
from bltjax.checkpoints.training_state import Checkpoints
from bltjax.config import RunConfig, from_config_dict
from bltjax.runtime.files import alone
from bltjax.runtime.peers import CRASHED
from bltjax.runtime.signals import STOPPED
from bltjax.training.optimizer import make_optimizer
from bltjax.training.state import abstract_state
from tests import processes
from tests.configs import tiny
from tests.processes import ended, free_port, metrics, wait_for_step

pytestmark = pytest.mark.long
STEPS, SAVED_EVERY = 15, 5  # of the byte latent transformer
ALL = ("entropy_model", "entropies", "blt", "evaluate")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """once(name, make): the directory that `make` filled, in whichever process of pytest it was."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pod"
    directory.mkdir(exist_ok=True)

    def once(name, make):
        with alone(directory):
            if not (directory / f"{name}.json").exists():
                result = make(directory / name)
                (directory / f"{name}.json").write_text(json.dumps(result))
        return directory / name, json.loads((directory / f"{name}.json").read_text())

    return once


@pytest.fixture(scope="module")
def start(shared):
    """start(workdir, processes, devices of each, mesh, ...) -> the processes of one run."""
    corpus, _ = shared("corpus", processes.write_corpus)

    def start(workdir, count, devices, mesh, stages=ALL, script=("-m", "bltjax.train")):
        flags = [
            "--config=tests/configs/tiny.py",
            f"--workdir={workdir}",
            f"--config.data.root={corpus}",
            "--config.evaluation.baselines=False",
            f"--config.stages={stages}",
            "--config.entropy_training.steps=5",
            f"--config.blt_training.steps={STEPS}",
            f"--config.blt_training.checkpoint_every={SAVED_EVERY}",
            *(f"--config.{s}.batch_size=8" for s in ("entropy_training", "blt_training")),
            "--config.evaluation.batch_size=8",
            *(
                f"--config.mesh.{a}={n}"
                for a, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)
            ),
        ]
        if count > 1:
            flags += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        return [
            subprocess.Popen(
                [sys.executable, *script, *flags, *([f"--process_id={i}"] if count > 1 else [])],
                cwd=processes.ROOT,
                env=processes.environment(devices),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for i in range(count)
        ]

    return start


def finished(run) -> dict:
    """The result of a run that ended well."""
    outputs = ended(run)
    assert [code for code, _, _ in outputs] == [0] * len(run), outputs
    assert all("{" not in out for _, out, _ in outputs[1:])  # process 0 alone speaks
    return json.loads(outputs[0][1].splitlines()[-1])


@pytest.fixture(scope="module")
def whole(start, shared):
    """The workdir and the result of an uninterrupted run of 2 processes with 4 devices each."""
    return shared("whole", lambda workdir: finished(start(workdir, 2, 4, (2, 2, 2))))


def before_training(whole, workdir):
    """A copy of the workdir as it was before the byte latent transformer."""
    shutil.copytree(whole[0], workdir, ignore=shutil.ignore_patterns("blt", "result.json"))
    return workdir


@pytest.fixture(scope="module")
def stopped(start, whole, shared):
    """The workdir of a run of which one process was asked to stop, and the step that it saved."""

    def stop(workdir):
        before_training(whole, workdir)
        victim, asked = random.choice([0, 1]), random.choice([signal.SIGTERM, signal.SIGINT])
        run = start(workdir, 2, 4, (2, 2, 2), ("blt",))
        wait_for_step(run, workdir, "blt", random.randrange(1, 10))
        run[victim].send_signal(asked)
        outputs = ended(run, timeout=100)
        assert [code for code, _, _ in outputs] == [STOPPED] * 2, (victim, asked, outputs)
        names = [path.name for path in (workdir / "blt" / "checkpoints").iterdir()]
        step = max(int(name) for name in names if name.isdigit())
        said = f"blt: stopped as asked, step {step} of {STEPS} is saved"
        assert all(said in err.splitlines()[-1] for _, _, err in outputs)
        return step

    return shared("stopped", stop)


def test_two_processes_are_one_run(start, whole, tmp_path):
    workdir, result = whole
    alone = finished(start(tmp_path / "alone", 1, 8, (2, 2, 2)))
    assert result["compilations"] == alone["compilations"]
    assert set(result["compilations"].values()) == {1}
    for stage in ("entropy_model", "blt"):
        ours, theirs = metrics(workdir, stage), metrics(tmp_path / "alone", stage)
        assert len(ours) == len(theirs) >= 5
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=0, atol=1e-5)
            np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5, atol=1e-5)
    for key in ("bits_per_byte", "threshold", "validation_bytes"):
        np.testing.assert_allclose(result[key], alone[key], rtol=1e-5)
    assert result["patch_use"] == pytest.approx(alone["patch_use"], abs=1e-4)
    assert result["entropy_model"] == pytest.approx(alone["entropy_model"], rel=1e-5)


def test_a_killed_process_ends_the_other_and_nothing_is_lost(start, whole, tmp_path):
    workdir, chance = before_training(whole, tmp_path / "killed"), random.Random()
    victim, step = chance.randrange(2), chance.randrange(1, STEPS - 2)
    print("killed process", victim, "after step", step)
    run = start(workdir, 2, 4, (2, 2, 2), ("blt",))
    wait_for_step(run, workdir, "blt", step)
    os.kill(run[victim].pid, signal.SIGKILL)
    killed = time.time()
    outputs = ended(run, timeout=100)
    codes = [code for code, _, _ in outputs]
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] in (CRASHED, -signal.SIGABRT)
    if codes[1 - victim] == CRASHED:  # JAX aborts, at length, when it notices before we do
        last = outputs[1 - victim][2].splitlines()[-1]
        assert last.startswith(f"process {victim} of 2 "), outputs
    assert time.time() - killed < 60
    finished(start(workdir, 2, 4, (2, 2, 2), ("blt",)))
    assert metrics(workdir, "blt") == metrics(whole[0], "blt"), (victim, step)


@pytest.mark.parametrize(
    "count, devices, mesh",
    [
        pytest.param(2, 4, (2, 2, 2), marks=pytest.mark.slow),
        pytest.param(1, 8, (1, 8, 1), marks=pytest.mark.slow),
        pytest.param(1, 1, (1, 1, 1), marks=pytest.mark.slow),
        pytest.param(4, 2, (4, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_anywhere(start, whole, stopped, tmp_path, count, devices, mesh):
    """The state is the same to the bit, since its fingerprints are compared; and so is the data."""
    (workdir, step), copy = stopped, tmp_path / "copy"
    shutil.copytree(workdir, copy)
    outputs = ended(start(copy, count, devices, mesh, ("blt",)))
    assert [code for code, _, _ in outputs] == [0] * count, outputs
    assert f"blt: resumed at step {step} of {STEPS}" in outputs[0][1]
    ours, expected = metrics(copy, "blt"), metrics(whole[0], "blt")
    if mesh == (2, 2, 2):
        assert ours == expected
    data = [k for k in expected[0] if k.startswith("bytes") or k.endswith("utilisation")]
    assert [[x[k] for k in data] for x in ours] == [[x[k] for k in data] for x in expected]
    losses = [[x["loss"] for x in lines] for lines in (ours, expected)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_state_is_equal_on_other_meshes(stopped, use_mesh):
    workdir, step = stopped
    config = from_config_dict(RunConfig, tiny.get_config())
    optimizer = make_optimizer(config.blt_training.optimizer, STEPS)
    digests = {}
    for mesh in (2, 2, 2), (1, 8, 1), (4, 2, 1), (1, 1, 1):
        with use_mesh(*mesh):
            checkpoints = Checkpoints(workdir / "blt" / "checkpoints", keep=3)
            restored = checkpoints.restore(abstract_state(config.blt, optimizer))
            checkpoints.close()
            assert restored.step == int(restored.state.step) == step
            digests[mesh] = [
                hashlib.sha256(x.tobytes()).hexdigest()
                for x in jax.tree.leaves(sharding.on_host(restored.state))
            ]
    assert all(digest == digests[2, 2, 2] for digest in digests.values())


FAILING = """
import resource, sys, time
from bltjax import cli, sharding
from bltjax.commands import train
put, calls = sharding.put_batch, []
def put_batch(batch):
    calls.append(1)
    if len(calls) == 9 and "--process_id=1" in sys.argv:
        print("fault at", time.time(), file=sys.stderr)
        FAULT
    return put(batch)
sharding.put_batch = put_batch
cli.run(train.main, train.define_flags)
"""
ON_FIRE = 'raise RuntimeError("the disk of this machine is on fire")'
FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"  # of this process's files


@pytest.mark.parametrize(
    "fault, last",
    [
        pytest.param(
            ON_FIRE,
            "RuntimeError: the disk of this machine is on fire",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            FULL,
            r"OSError: cannot write \S+/\d+ \(File too large\): .*: it (starts anew|goes on .*)",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["exception", "full disk"],
)
def test_a_fault_in_one_process_ends_all_and_every_log_ends_with_it(
    start, whole, tmp_path, fault, last
):
    workdir = before_training(whole, tmp_path / "failed")
    script = FAILING.replace("FAULT", fault)
    outputs = ended(start(workdir, 2, 2, (4, 1, 1), ("blt",), ("-c", script)), timeout=120)
    assert [code for code, _, _ in outputs] == [CRASHED] * 2, outputs
    for _, _, err in outputs:
        lines = err.strip().splitlines()
        assert re.fullmatch(last, lines[-1]), err
        assert "process 1 of 2 failed:" in lines and "Traceback" in err
    happened = float(re.search(r"fault at (\S+)", outputs[1][2])[1])
    assert time.time() - happened < 60


@pytest.mark.parametrize(
    "rule, stages",
    [
        ("space", ("blt", "evaluate")),
        pytest.param("entropy", (*ALL, "sample"), marks=pytest.mark.slow),
    ],
)
def test_the_launcher_of_local_processes_takes_a_run_through_its_stages(tmp_path, rule, stages):
    """On the text that every machine has, with few steps."""
    few = [
        f"--config.patching.rule={rule}",
        f"--config.stages={stages}",
        "--config.data.max_bytes=200000",
        "--config.entropy_training.steps=4",
        "--config.blt_training.steps=4",
        "--config.blt_training.log_every=1",
        "--config.evaluation.max_bytes=50000",
        "--config.evaluation.baselines=False",
    ]
    command = ["launch/local_processes.sh", "2", "--", "--config=tests/configs/tiny.py"]
    process = subprocess.run(
        [*command, f"--workdir={tmp_path / 'two'}", *few],
        cwd=processes.ROOT,
        env=dict(processes.environment(), PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0, process.stderr
    assert "2 processes, found by flags" in process.stdout
    assert "mesh: {'data': 2, 'fsdp': 1, 'tensor': 1}" in process.stdout
    result = json.loads(process.stdout.splitlines()[-1])
    assert [line["step"] for line in metrics(tmp_path / "two", "blt")] == [0, 1, 2, 3]
    assert 5 < result["bits_per_byte"] < 9 and result["compilations"]["blt"] == 1
    if "sample" in stages:
        assert result["sample"].startswith("def ") and "".join(result["patches"])
