"""The command that makes records with entropies: killed, shared, and read by training."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from bltjax.config import PatchingConfig
from bltjax.data.records import store as records
from bltjax.patching.boundaries import patch_starts
from bltjax.vocabulary import encode
from tests import processes
from tests.processes import ROOT

# About files and processes, so one interpreter will do.
pytestmark = pytest.mark.long

LANGUAGES = {"en": ["patch", "byte", "latent", "x=1;\n"], "ja": ["日本", "語", "の文。\n"]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A directory of text and a file of JSON lines, one of which is broken, as settings."""
    corpus, words = tmp_path_factory.mktemp("corpus"), random.Random(0)
    (corpus / "text").mkdir()

    def text(language, number):
        return " ".join(words.choices(LANGUAGES[language], k=number))

    for number in range(14):
        (corpus / "text" / f"{number}.txt").write_text(text("en", 200))
    with (corpus / "web.jsonl").open("w") as file:
        for number in range(30):
            record = dict(content=text("ja", 80), id=number, lang="ja")
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.write('{"content": \n')
    config = ROOT / "tests" / "configs" / "tiny.py"
    settings = corpus / "mixture.py"
    settings.write_text(
        f"import runpy\n\n\ndef get_config():\n"
        f"    config = runpy.run_path({str(config)!r})['get_config']()\n"
        f"    config.data.sources = (\n"
        f"        dict(name='text', path={str(corpus / 'text')!r}, weight=3.0),\n"
        f"        dict(name='web', path={str(corpus / 'web.jsonl')!r}, weight=1.0),\n"
        f"    )\n"
        f"    return config\n"
    )
    return settings


@pytest.fixture(scope="module")
def start(sources, tmp_path_factory):
    def start(command, workdir, *settings):
        given = f"--config={sources}", f"--workdir={workdir}", *settings
        return processes.start(f"bltjax.{command}", *given, env=processes.environment())

    return start


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def files_of(workdir):
    found = (workdir / "records").rglob("*")
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in found
        if path.is_file() and ".locks" not in path.parts and path.name != "report.json"
    }


def number_of_files(workdir):
    """How many files the records have; none is opened, since another process renames them."""
    return sum(len(files) for _, _, files in os.walk(workdir / "records"))


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    """A working directory with an entropy model and records, and the report on these."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    finish(start("train", workdir, "--config.stages=('entropy_model',)"))
    return workdir, finish(start("preprocess", workdir))


def test_the_report_is_of_the_whole_corpus(run):
    workdir, report = run
    store = records.open_store(workdir / "records")
    assert report == json.loads((workdir / "records" / "report.json").read_text())
    assert report["documents"] == {p: store.documents(p) for p in records.PARTS}
    assert sum(report["documents"].values()) == 14 + 30
    assert {n: s["bad"] for n, s in report["sources"].items()} == dict(text=0, web=1)
    assert list(report["languages"]) == ["ja"]
    assert report["languages"]["ja"]["documents"] == report["sources"]["web"]["documents"]
    patching = PatchingConfig(threshold=report["threshold"])
    patches_a_byte, lengths = 0.0, []
    for source, share in (("text", 0.75), ("web", 0.25)):  # as they are mixed in training
        documents = records.Documents(store.shards(source), entropies=True)
        of_source = []
        for document in (documents[i] for i in range(len(documents))):
            ids = encode(document.data)
            starts = patch_starts(patching, ids, document.entropies)[: len(ids)]
            of_source.append(np.diff(np.flatnonzero(starts), append=len(ids)))
        lengths += of_source
        own = np.concatenate(of_source)
        assert report["sources"][source]["mean_patch_bytes"] == pytest.approx(own.mean())
        patches_a_byte += share / own.mean()
    assert report["mean_patch_bytes"] == pytest.approx(1 / patches_a_byte, rel=1e-3)
    lengths = np.concatenate(lengths)
    assert report["length_histogram"][:256] == np.bincount(lengths, minlength=257)[:256].tolist()
    assert report["lengths"]["max"] == min(lengths.max(), 256)


def test_killed_anywhere_and_run_again_by_two(run, start, tmp_path):
    workdir, report = run
    again = tmp_path / "killed"
    again.mkdir()
    (again / "config.json").write_bytes((workdir / "config.json").read_bytes())
    os.symlink(workdir / "entropy_model", again / "entropy_model")
    process, chance = start("preprocess", again), random.Random()
    wanted = chance.randrange(1, number_of_files(workdir))
    print("killed after files", wanted)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline and number_of_files(again) < wanted:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    both = [start("preprocess", again) for _ in range(2)]
    reports = [finish(p) for p in both]
    assert [r | dict(records="") for r in reports] == [report | dict(records="")] * 2
    left = {name: data for name, data in files_of(again).items() if not name.endswith(".partial")}
    assert left == files_of(workdir)


def test_training_reads_the_records_in_their_mixture(run, start):
    workdir, _ = run
    entropies = {p: p.stat().st_mtime_ns for p in workdir.rglob("*.entropies.array_record")}
    stages = "--config.stages=('blt','evaluate')"
    result = finish(start("train", workdir, stages, "--config.data.workers=1"))
    assert entropies == {p: p.stat().st_mtime_ns for p in workdir.rglob("*.entropies*record")}
    assert set(result["sources"]) == {"text", "web"}
    weighted = sum(s["bits_per_byte"] * s["bytes"] for s in result["sources"].values())
    assert result["bits_per_byte"] == pytest.approx(weighted / result["validation_bytes"])
    last = json.loads((workdir / "blt" / "metrics.jsonl").read_text().splitlines()[-1])
    seen = {name: last[f"bytes_seen/{name}"] for name in ("text", "web")}
    assert seen["text"] > seen["web"] > 0


@pytest.mark.slow
def test_patches_found_in_the_step(run, start):
    workdir, _ = run
    other = workdir.with_name("in_step")
    other.mkdir()
    os.symlink(workdir / "entropy_model", other / "entropy_model")
    claim = json.loads((workdir / "config.json").read_text())
    claim["config"]["patching"]["in_step"] = True
    claim["config"]["evaluation"]["baselines"] = False
    (other / "config.json").write_text(json.dumps(claim))
    settings = ["--config.patching.in_step=True", "--config.evaluation.baselines=False"]
    result = finish(start("train", other, *settings, "--config.stages=('blt','evaluate')"))
    assert result["compilations"]["blt"] == 1 and "patch_utilisation" not in result
    last = json.loads((other / "blt" / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(last["mean_patch_bytes"] - 4.5) < 2 and last["overflow"] >= 0
    assert 0 < result["bits_per_byte"] < 8
    assert result["compilations"]["patch_use"] == 1 and result["patch_use"]["bytes"] > 0


def test_an_entropy_model_is_brought_or_missed(run, start, tmp_path):
    workdir, report = run
    process = start("preprocess", tmp_path / "none")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1
    assert "there is no entropy model" in err and "--entropy_model" in err
    brought = finish(start("preprocess", tmp_path / "none", f"--entropy_model={workdir}"))
    assert brought["threshold"] == report["threshold"]
    assert files_of(tmp_path / "none") == files_of(workdir)
    process = start(
        "preprocess",
        tmp_path / "other",
        f"--entropy_model={workdir}",
        "--config.entropy_model.transformer.num_layers=2",
    )
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "num_layers: 1 there, 2 here" in err


@pytest.fixture
def copied(run, tmp_path):
    """A working directory with the entropy model alone, and the files and the report to come."""
    workdir, report = run
    (tmp_path / "copied").mkdir()
    (tmp_path / "copied" / "config.json").write_bytes((workdir / "config.json").read_bytes())
    os.symlink(workdir / "entropy_model", tmp_path / "copied" / "entropy_model")
    return tmp_path / "copied", files_of(workdir), report | dict(records="")


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster whose machines, processes of this one, are still to be added."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    for name, value in processes.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they wait for all other tests
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0))
    yield cluster
    cluster.shutdown()


def kill_machine(node):
    """kill -9 of a machine of the cluster and of all its processes."""
    raylet = node.all_processes["raylet"][0].process.pid
    pids = [raylet]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == raylet:
                pids.append(int(stat.parent.name))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_cluster_makes_the_same_records_though_a_machine_goes_and_another_comes(
    copied, start, cluster
):
    workdir, expected, report = copied
    machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
    moment = os.environ.get("MOMENTS") or str(random.randrange(1000))
    draw = random.Random(moment)
    process = start("preprocess", workdir, f"--ray={cluster.address}")
    wanted = draw.randrange(2, len(expected) - 2)
    print(f"MOMENTS={moment}: killed after {wanted} files of {len(expected)}")
    while process.poll() is None and number_of_files(workdir) < wanted:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()
    kill_machine(draw.choice(machines))
    cluster.add_node(num_cpus=1)
    assert finish(process) | dict(records="") == report
    left = {name: data for name, data in files_of(workdir).items() if not name.endswith(".partial")}
    assert left == expected
