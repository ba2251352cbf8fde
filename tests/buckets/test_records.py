"""Records in a bucket, read from local copies."""

import os
import time

import pytest

from bltjax.config.data import DataConfig
from bltjax.data.records import store as records
from bltjax.data.records import writing
from bltjax.data.records.store import Documents
from bltjax.runtime import buckets, object_cache
from bltjax.runtime.object_cache import Settings
from tests.processes import write_corpus


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A directory of copies, as a process that has just begun finds it."""
    settings = Settings(str(tmp_path / "cache"))
    monkeypatch.setattr(object_cache, "_settings", settings)
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch):
    monkeypatch.setattr(object_cache, "_known", {})
    monkeypatch.setattr(object_cache, "_checked", set())


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus")
    for number in range(4, 12):
        (tmp_path / "corpus" / f"{number}.txt").unlink()
    return DataConfig(root=str(tmp_path / "corpus"), validation_fraction=0.3, shard_bytes=2000)


def texts(store):
    return [document.data for document in Documents(store.all_shards)]


def texts_of(shard):
    return [document.data for document in Documents([shard])]


def copies(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_records_are_those_of_a_disk(corpus, cache, bucket, tmp_path):
    here, there = records.build(tmp_path / "records", corpus), records.build(bucket, corpus)
    assert there.digest() == here.digest()
    assert texts(there) == texts(here)
    for name, found in buckets.below(bucket).items():
        if "array_record" in name:
            assert buckets.read(bucket / name) == (tmp_path / "records" / name).read_bytes()
            assert found.size == (tmp_path / "records" / name).stat().st_size
    assert records.open_store(bucket, corpus) == there
    assert not any(".lock" in name for name in buckets.below(bucket))


def test_what_is_missing_is_made_anew(corpus, cache, bucket):
    store = records.build(bucket, corpus)
    buckets.delete(store.all_shards[0].path)
    object_cache.forget(store.all_shards[0].path)
    with pytest.raises(records.Unfinished, match="is missing"):
        records.open_store(bucket)
    assert records.build(bucket, corpus).digest() == store.digest()


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "deleted"])
def test_a_broken_copy_is_fetched_again(corpus, cache, bucket, monkeypatch, damage):
    store = records.build(bucket, corpus)
    whole = texts(store)
    forget(monkeypatch)
    for path in copies(cache):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        if damage == "deleted":
            path.unlink()
        else:
            path.write_bytes(data if damage == "flipped bit" else data[:-1])
    assert texts(store) == whole


def test_a_copy_is_not_fetched_again(corpus, cache, bucket, server, monkeypatch):
    store = records.build(bucket, corpus)
    forget(monkeypatch)
    before = len(server.requests())
    assert texts(records.open_store(bucket)) == texts(store)
    asked = server.requests()[before:]
    assert not [r for r in asked if "download" in r and ".array_record" in r]
    assert len(asked) <= 5  # settings, index, one listing


def test_shards_without_entropies_cost_one_listing(corpus, cache, bucket, server, monkeypatch):
    store = records.build(bucket, corpus)
    whole, *bare = store.all_shards
    records.write_entropies(whole, [[0.5] * (len(text) + 2) for text in texts_of(whole)])
    assert len(bare) > 1
    forget(monkeypatch)
    before = len(server.requests())
    assert records.without_entropies(store.directory, store.all_shards) == bare
    assert len(server.requests()) == before + 1


def test_marks_of_all_units_cost_one_listing_and_a_read_of_each(
    corpus, cache, bucket, server, monkeypatch
):
    records.build(bucket, corpus)
    tasks = records._tasks(bucket, records._read_store(bucket, corpus), corpus.named_sources())
    buckets.delete(writing._mark(bucket, tasks[1], 0))
    forget(monkeypatch)
    before = len(server.requests())
    first, second, *others = writing.chunks_of_all(bucket, tasks)
    assert second == [] and others and all(unit[-1]["last"] for unit in (first, *others))
    assert len(server.requests()) == before + 1 + sum(map(len, (first, *others)))


def test_a_damaged_object_is_named(corpus, cache, bucket, monkeypatch):
    store = records.build(bucket, corpus)
    path = store.all_shards[0].path
    data = bytearray(buckets.read(path))
    start = next(i for i in range(len(data)) if 0 not in data[i : i + 50])  # documents
    data[start + 20] ^= 1
    buckets.write(path, bytes(data))
    forget(monkeypatch)
    with pytest.raises(ValueError, match=r"gs://.*array_record is damaged"):
        texts(store)


def test_copies_that_were_not_used_for_longest_are_deleted(bucket, cache, monkeypatch):
    monkeypatch.setattr(object_cache, "_settings", Settings(str(cache), 2500))
    for name in "abc":
        buckets.write(bucket / name, name.encode() * 1000)
    first, second = (object_cache.local_copy(bucket / name) for name in "ab")
    os.utime(first, (time.time() - 20, time.time() - 20))
    os.utime(second, (time.time() - 30, time.time() - 30))
    object_cache.local_copy(bucket / "a")  # used since
    third = object_cache.local_copy(bucket / "c")
    assert copies(cache) == sorted([first, third])
    assert object_cache.local_copy(bucket / "b").read_bytes() == b"b" * 1000


def test_an_object_that_is_written_anew_has_another_copy(bucket, cache, monkeypatch):
    for text in (b"older", b"newer"):
        buckets.write(bucket / "file", text)
        forget(monkeypatch)
        assert object_cache.local_copy(bucket / "file").read_bytes() == text


def test_what_does_not_arrive_whole_is_no_copy(bucket, cache, monkeypatch):
    buckets.write(bucket / "file", b"whole")
    monkeypatch.setattr(buckets, "download", lambda source, target: target.write_bytes(b"who"))
    with pytest.raises(OSError, match="did not arrive as it is stored"):
        object_cache.local_copy(bucket / "file")
    assert copies(cache) == []
