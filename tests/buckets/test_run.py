"""Runs whose working directory and text are in a bucket, beside the same ones on a disk."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import bltjax
from bltjax import sharding
from bltjax.checkpoints import formats
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.orbax_weights import read_record
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.run_directory import RunDirectory, saved_steps
from bltjax.checkpoints.weights import flat
from bltjax.config import RunConfig, from_config_dict
from bltjax.recipe.checks import CheckedRun
from bltjax.recipe.stages import run
from bltjax.runtime import buckets, object_cache
from bltjax.runtime.files import owning
from bltjax.runtime.paths import as_path
from bltjax.training import loop
from tests.configs import tiny
from tests.processes import ROOT, environment, free_port, write_corpus

pytestmark = pytest.mark.long  # one interpreter will do

OF_MACHINE = ("workdir", "seconds", "data_wait_fraction", "compilations")
OPTIONS = [
    "--config=tests/configs/tiny.py",
    "--config.stages=('entropy_model',)",
    "--config.entropy_training.checkpoint_every=2",
    "--config.entropy_training.steps=16",
]


def without_machine(result):
    return {name: value for name, value in result.items() if name not in OF_MACHINE}


def config_of(corpus, cache, **changes):
    given = tiny.get_config()
    given.data.root, given.data.cache = str(corpus), str(cache)
    given.evaluation.baselines, given.evaluation.patch_use_rows = False, 0
    for name, value in changes.items():
        given.update_from_flattened_dict({name: value})
    return from_config_dict(RunConfig, given)


@pytest.fixture(scope="module")
def runs(made_bucket, tmp_path_factory):
    """(path, result) of a run on a disk, and of the same with its text in the bucket too."""
    there = tmp_path_factory.mktemp("runs")
    write_corpus(there / "corpus")
    remote = f"gs://{made_bucket.name}/runs"
    buckets.opened(remote)
    buckets.upload_below(there / "corpus", f"{remote}/corpus")
    found = []
    for corpus, path in ((there / "corpus", there / "run"), (f"{remote}/corpus", f"{remote}/run")):
        found.append((as_path(path), run(checked(config_of(corpus, there / "cache"), path))))
    return found


def checked(config, path) -> CheckedRun:
    """A run on one device."""
    object_cache.use(object_cache.Settings(config.data.cache, config.data.cache_bytes))
    directory = RunDirectory(as_path(path))
    directory.claim(config)
    return CheckedRun(config, directory, sharding.make_mesh(devices=jax.devices()[:1]))


def test_a_run_in_a_bucket_is_the_one_on_a_disk(runs):
    (disk, on_disk), (remote, in_bucket) = runs
    assert without_machine(in_bucket) == without_machine(on_disk)
    assert json.loads(buckets.read(remote / "result.json")) == in_bucket
    lines = buckets.read(remote / "blt" / "metrics.jsonl").decode().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(24))
    local = json.loads((disk / "blt" / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(lines[-1])["loss"] == local["loss"]
    names = buckets.below(remote)
    assert any("tensorboard/events" in name for name in names)
    assert not any(name.endswith((".lock", ".partial")) for name in names)


def test_what_is_trained_in_a_bucket_loads_and_converts(runs, bucket, tmp_path):
    (disk, _), (remote, _) = runs
    object_cache.use(object_cache.Settings(str(tmp_path / "cache")))
    texts = [bltjax.load(path).generate(["patch "], max_new_bytes=8) for path in (disk, remote)]
    assert texts[0] == texts[1]
    convert(remote, bucket / "hf", "hf")
    convert(bucket / "hf", tmp_path / "own", "bltjax")
    convert(tmp_path / "own", bucket / "own", "bltjax")
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        ours, theirs = (flat(formats.read(path).params) for path in (disk, bucket / "own"))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(read_all(array), read_all(theirs[name]))
    with pytest.raises(FileExistsError, match="exists: choose another"):
        convert(remote, bucket / "hf", "hf")


def test_requests_of_steps(runs, bucket, server, tmp_path, monkeypatch):
    """Steps without a checkpoint make none."""
    asked, next_batch = [], loop._Run.next_batch

    def count(self, stop):
        batch = next_batch(self, stop)
        time.sleep(0.05)  # what was read ahead has come
        asked.append(len(server.requests()))
        return batch

    monkeypatch.setattr(loop._Run, "next_batch", count)
    changes = {"stages": ("blt",), "patching.rule": "space", "blt_training.steps": 8}
    changes["blt_training.checkpoint_every"] = 100
    config = config_of(runs[0][0].parent / "corpus", tmp_path / "cache", **changes)
    run(checked(config, bucket))
    assert len(asked) == 8 and asked[1:] == asked[1:2] * 7, server.requests()[asked[1] :]
    assert saved_steps(bucket / "blt" / "checkpoints") == [8]


def test_a_second_run_is_refused(runs, tmp_path):
    remote = runs[1][0]
    corpus = f"{remote.parent}/corpus"
    again = checked(config_of(corpus, tmp_path / "cache"), remote)
    with owning(remote), pytest.raises(BlockingIOError, match="is in use by process"):
        run(again)


def start(workdir, corpus, cache, *options):
    command = [sys.executable, "-m", "bltjax.train", *OPTIONS, *options]
    command += [f"--workdir={workdir}", f"--config.data.root={corpus}"]
    command += [f"--config.data.cache={cache}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes)


def ended(process):
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_killed_at_random_moments_it_ends_with_the_same_bits(bucket, server, tmp_path, kills):
    """While the corpus is recorded, models are trained, entropies computed, or it is evaluated."""
    write_corpus(tmp_path / "corpus")
    places = tmp_path / "corpus", tmp_path / "cache"
    stages = "--config.stages=entropy_model,entropies,blt,evaluate"
    whole = ended(start(bucket / "whole", *places, stages))
    in_all = requests_of(server, f"{bucket.name}/whole")
    draw, name = random.Random(os.environ.get("MOMENTS", "7")), f"{bucket.name}/killed"
    for _ in range(kills):
        process = start(bucket / "killed", *places, stages)
        wanted = requests_of(server, name) + draw.randint(20, in_all)
        while requests_of(server, name) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    killed = ended(start(bucket / "killed", *places, stages))
    assert without_machine(killed) == without_machine(whole)
    for stage, steps in (("entropy_model", 16), ("blt", 24)):
        runs = [bucket / name / stage for name in ("whole", "killed")]
        lines = [buckets.read(path / "metrics.jsonl").splitlines() for path in runs]
        losses = [[json.loads(line)["loss"] for line in of_run] for of_run in lines]
        assert losses[0] == losses[1] and len(losses[0]) == steps
        records = [read_record(path / "checkpoints" / str(steps)) for path in runs]
        assert records[0]["arrays"] == records[1]["arrays"]
        assert records[0]["position"] == records[1]["position"]


def requests_of(server, name):
    """How many requests there were for something below a name."""
    return sum(name in line.replace("%2F", "/") for line in server.requests())


def test_a_bucket_that_is_not_there_is_one_line(server, tmp_path):
    process = start("gs://absent/run", tmp_path, tmp_path / "cache")
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 2
    assert output.strip() == "error: there is no bucket gs://absent: check its name, or create it"


@pytest.mark.slow
def test_two_processes_share_a_bucket(bucket, tmp_path):
    """Each writes its part, a third is refused, and one process goes on from what two saved."""
    write_corpus(tmp_path / "corpus")

    def begin(workdir, *options, cache="cache"):
        return start(workdir, tmp_path / "corpus", tmp_path / cache, *options)

    ended(begin(bucket / "one"))
    shared, place = bucket / "two", f"--coordinator=127.0.0.1:{free_port()}"
    saved = shared / "entropy_model" / "checkpoints"
    two = [begin(shared, place, "--num_processes=2", f"--process_id={i}", cache=i) for i in "01"]
    while not saved_steps(saved) and all(process.poll() is None for process in two):
        time.sleep(0.05)
    two[0].send_signal(signal.SIGSTOP)  # so that the third meets them
    third = begin(shared)
    output = third.communicate(timeout=240)[0]
    assert third.returncode == 2 and "is in use by process" in output.splitlines()[-1], output
    for process in two:
        process.kill()
        process.communicate()
    step = saved_steps(saved)[-1]
    assert read_record(saved / str(step))["about"]["processes"] == 2
    process = begin(shared)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and f"resumed at step {step} of 16" in output, output
    runs = [buckets.read(bucket / n / "entropy_model" / "metrics.jsonl") for n in ("one", "two")]
    losses = [[json.loads(line)["loss"] for line in lines.splitlines()] for lines in runs]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)
