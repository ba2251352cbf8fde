"""Documents and entropies come back from their files, and damage is told."""

import collections
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest

from bltjax.config.data import DataConfig
from bltjax.data.records import shards
from bltjax.data.records import store as records
from bltjax.data.sources.units import Document
from bltjax.patching.calibrate import ScoreHistogram
from tests.record_stores import LANGUAGES, FakeSources, entropies_of


def test_damage_inside_a_file_is_told_when_it_is_read(store):
    shard = store.shards("code")[0]
    for path in (shard.path, shard.entropies_path):
        content = path.read_bytes()
        for wrong in (content[:-1000], b"", b"x" * len(content)):
            path.write_bytes(wrong)
            with pytest.raises(ValueError, match=f"{path} is damaged .* expected"):
                records.Documents([shard], entropies=True)[0]
        path.write_bytes(content[:200] + b"xx" + content[202:])
        with pytest.raises(ValueError, match=f"{path} is damaged .*hash"):
            documents = records.Documents([shard], entropies=True)
            [documents[i] for i in range(len(documents))]
        path.write_bytes(content)


def test_entropies_of_other_documents_are_told(store):
    shard = store.shards("code")[0]
    with shards.replacing_records(shard.entropies_path) as writer:
        for row in entropies_of(shard):
            writer.write(row[1:].astype("<f2").tobytes())
    with pytest.raises(ValueError, match=r"is damaged \(\d+ entropies for \d+ bytes\)"):
        records.Documents([shard], entropies=True)[0]


def test_entropies_come_back_with_their_documents(whole):
    for shard in whole.shards():
        documents = records.Documents([shard], entropies=True)
        for i, expected in enumerate(entropies_of(shard)):
            assert documents[i].entropies.dtype == np.float16
            np.testing.assert_array_equal(documents[i].entropies, expected.astype(np.float16))


def test_scores_are_those_of_the_stored_entropies(whole):
    expected = collections.defaultdict(ScoreHistogram)
    for source in whole.sources:
        documents = records.Documents(whole.shards(source), entropies=True)
        for i in range(len(documents)):
            expected[source, documents[i].language].add(documents[i].entropies)
    found = records.score_histogram(whole.shards())
    assert found.keys() == expected.keys() == {("code", ""), *(("web", n) for n in LANGUAGES)}
    for key in found:
        for name, array in expected[key].arrays().items():
            np.testing.assert_array_equal(found[key].arrays()[name], array)


def test_entropies_must_fit_their_documents(corpus, tmp_path):
    shard = records.build(tmp_path, corpus).shards()[0]
    rows = entropies_of(shard)
    for wrong, message in (
        (rows[:-1], "argument 2 is shorter"),
        ([*rows, rows[0]], "argument 2 is longer"),
        ([rows[0][1:], *rows[1:]], "give one per byte and one each for BOS and EOS"),
    ):
        with pytest.raises(ValueError, match=message):
            records.write_entropies(shard, wrong)
        assert not records.has_entropies(shard)
    for read in (
        lambda: records.Documents([shard], entropies=True),
        lambda: records.score_histogram([shard]),
    ):
        with pytest.raises(FileNotFoundError, match=r"no entropies of .*: make them with"):
            read()


def test_few_files_are_open_whoever_reads(whole, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_READERS", 2)
    documents = records.Documents(whole.shards(), entropies=True)
    alone = [documents[i] for i in range(len(documents))]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(documents)), 20))
    with ThreadPoolExecutor(8) as pool:
        for i, document in zip(order, pool.map(documents.__getitem__, order), strict=True):
            assert document.data == alone[i].data and document.name == alone[i].name
            np.testing.assert_array_equal(document.entropies, alone[i].entropies)
    if sys.platform == "linux":
        opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert 1 <= sum(str(whole.directory.resolve()) in path for path in opened) <= 4
    copy = pickle.loads(pickle.dumps(documents))
    assert copy[3].data == alone[3].data and len(copy) == len(alone)
    for index in (-1, len(documents)):
        with pytest.raises(IndexError, match=f"document {index} of {len(documents)}"):
            documents[index]


def test_grain_reads_them_in_any_order(whole):
    documents = records.Documents(whole.shards())
    read = list(grain.MapDataset.source(documents).shuffle(seed=1).to_iter_dataset())
    assert sorted(read) == sorted(documents[i] for i in range(len(documents)))
    assert read != sorted(read)


def test_a_document_of_100_megabytes(tmp_path):
    large = Document("large", np.random.default_rng(0).bytes(100_000_000))
    with FakeSources([[Document("small", b"1"), large, Document("last", b"2")]]):
        store = records.build(tmp_path, DataConfig(validation_fraction=1e-9))
    assert [shard.documents for shard in store.shards()] == [2, 1]
    assert records.Documents(store.shards())[1].data == large.data
