"""Killed at any moment, or done by several processes, a store ends with the same files."""

import dataclasses
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bltjax.config.data import DataConfig
from bltjax.data.records import store as records
from bltjax.data.sources.units import Document
from tests.record_stores import FakeSources, add_entropies, all_documents, entropies_of, files_of

ROOT = Path(__file__).parents[3]

# Forks a child for each moment; the child dies at its n-th call of os.replace, before it or after,
# or at its n-th record.
KILLED = """
import os, pathlib, pickle, signal, sys
from bltjax.data.records import store as records
from bltjax.data.records import writing
data, job, moments = pickle.load(open(sys.argv[1], "rb"))
def dying(function, when, n):
    def call(*args):
        nonlocal n
        n -= 1
        if n == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args)
        if n == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
def build(directory, when, n):
    if when == "record":
        writing.encoded = dying(writing.encoded, when, n)
    records.build(directory, data)
def add_entropies(directory, when, n):
    row = dying(lambda row: row, when, n if when == "record" else 0)
    for shard in records.open_store(directory).shards("web", "validation"):
        records.write_entropies(shard, map(row, job[pathlib.Path(shard.stem).name]))
for (when, n), directory in moments:
    if not (child := os.fork()):
        if when != "record":
            os.replace = dying(os.replace, when, n)
        (add_entropies if job else build)(directory, when, n)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, (when, n)
"""


def run_killed(tmp_path: Path, data: DataConfig, moments: list[tuple], job: dict | None = None):
    """`moments` with a directory each; `job`: the entropies to write, or None to build."""
    job_file = tmp_path / "job"
    job_file.write_bytes(pickle.dumps((data, job, moments)))
    command = [sys.executable, "-c", KILLED, str(job_file)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def moments_among(num_replaced: int) -> list[tuple[str, int]]:
    numbers = np.linspace(1, num_replaced, 4).astype(int).tolist()
    replaced = [(when, n) for n in numbers for when in ("before", "after")]
    return [*replaced, ("record", 1), ("record", 9)]


def test_a_killed_build_goes_on_to_the_same_files(corpus, tmp_path):
    expected = files_of(records.build(tmp_path / "whole", corpus).directory)
    moments = [(m, tmp_path / f"killed{m}") for m in moments_among(len(expected))]
    run_killed(tmp_path, corpus, moments)
    for moment, directory in moments:
        left = files_of(directory)
        assert "index.json" not in left or moment == ("after", len(expected))
        whole = {n: content for n, content in left.items() if not n.endswith(".partial")}
        assert whole.items() <= expected.items()
        records.build(directory, corpus)
        assert files_of(directory) == expected


def test_killed_entropies_go_on_to_the_same_files(corpus, tmp_path):
    store = records.build(tmp_path / "whole", corpus)
    bare = files_of(store.directory)
    chosen = store.shards("web", "validation")
    for shard in chosen:
        records.write_entropies(shard, entropies_of(shard))
    expected = files_of(store.directory)
    assert len(expected) == len(bare) + 2 * len(chosen)

    moments = []
    for moment in moments_among(2 * len(chosen)):
        moments.append((moment, tmp_path / f"killed{moment}"))
        for name, content in bare.items():
            (moments[-1][1] / name).parent.mkdir(parents=True, exist_ok=True)
            (moments[-1][1] / name).write_bytes(content)
    run_killed(tmp_path, corpus, moments, {Path(s.stem).name: entropies_of(s) for s in chosen})
    for moment, directory in moments:
        left = records.open_store(directory).shards("web", "validation")
        left = [shard for shard in left if not records.has_entropies(shard)]
        assert bool(left) == (moment != ("after", 2 * len(chosen)))
        for shard in left:
            records.write_entropies(shard, entropies_of(shard))
        assert files_of(directory) == expected


TOGETHER = """
import pathlib, pickle, sys, time
from bltjax.data.records import store as records
from bltjax.data.records import writing
directory, data = pickle.load(open(sys.argv[1], "rb"))
encoded = writing.encoded
def slowly(document):
    time.sleep(0.01)
    print(document.name)
    return encoded(document)
writing.encoded = slowly
pathlib.Path(sys.argv[1] + sys.argv[2]).touch()
while not pathlib.Path(sys.argv[1] + "start").exists():
    time.sleep(0.01)
records.build(directory, data)
"""


def test_two_processes_share_the_work(corpus, whole, tmp_path):
    job = tmp_path / "job"
    job.write_bytes(pickle.dumps((tmp_path / "records", corpus)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(job), name],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    while not all(Path(f"{job}{name}").exists() for name in "ab"):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    Path(f"{job}start").touch()
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    store = records.open_store(tmp_path / "records")
    names = {document.name for document in all_documents(store)}
    written_by = [names.intersection(text.splitlines()) for text in printed]
    assert all(written_by), "one process did everything"
    assert written_by[0].isdisjoint(written_by[1]) and set.union(*written_by) == names
    add_entropies(store)
    assert files_of(tmp_path / "records") == files_of(whole.directory)


def test_a_source_that_shrank_is_told(corpus, whole, tmp_path):
    unit = [Document(str(i), b"x" * 60) for i in range(10)]
    data = DataConfig(shard_bytes=100)
    with FakeSources([unit]):
        store = records.build(tmp_path, data)
    (store.directory / "index.json").unlink()
    sorted((store.directory / "text").glob("*.json"))[-1].unlink()
    with (
        FakeSources([unit[:5]]),
        pytest.raises(ValueError, match="part u0 of source 'text' has changed"),
    ):
        records.build(tmp_path, data)


def test_entropies_of_the_source_are_kept(tmp_path):
    rows = [np.linspace(0, 5, n + 2, dtype=np.float16) for n in range(8)]
    unit = [Document(f"{n}", b"x" * n, "en", rows[n]) for n in range(8)]
    half = [document._replace(name=f"half{document.name}") for document in unit]
    half[5] = half[5]._replace(entropies=None)
    data = DataConfig(validation_fraction=1e-9)
    with FakeSources([unit, half]):
        with_entropies, without = records.build(tmp_path, data).shards()
    assert records.has_entropies(with_entropies) and not records.has_entropies(without)
    documents = records.Documents([with_entropies], entropies=True)
    for n in range(8):
        np.testing.assert_array_equal(documents[n].entropies, rows[n])


def test_training_reads_the_beginnings_of_documents(tmp_path):
    rows = [np.linspace(0, 5, n + 2, dtype=np.float16) for n in range(60)]
    unit = [Document(f"{n}", bytes(range(n)), "en", rows[n]) for n in range(60)]
    data = DataConfig(validation_fraction=0.3, max_document_bytes=20, shard_bytes=300)
    with FakeSources([unit]):
        store = records.build(tmp_path, data)
    for part, most in (("train", 20), ("validation", 59)):
        shards = store.shards(part=part)
        documents = records.Documents(shards, entropies=True)
        sizes = [len(documents[i].data) for i in range(len(documents))]
        assert (max(sizes) == 20) == (part == "train") and sum(sizes) == store.num_bytes(part)
        for i, size in enumerate(sizes):
            n = int(documents[i].name)
            assert documents[i].data == bytes(range(min(n, most)))
            np.testing.assert_array_equal(documents[i].entropies, rows[n][: size + 2])
    with FakeSources([unit]), pytest.raises(ValueError, match="max_document_bytes"):
        records.build(tmp_path, dataclasses.replace(data, max_document_bytes=30))
