"""Whatever the corpus holds comes back from its records, whole and once; what is wrong is told."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.records import store as records
from bltjax.data.sources import units as sources
from bltjax.data.sources.units import Bad, Document
from bltjax.runtime import checked_json, progress
from tests.record_stores import (
    LANGUAGES,
    FakeSources,
    add_entropies,
    all_documents,
    files_of,
    write_corpus,
)


def read_directly(data: DataConfig) -> list[Document]:
    read = [
        document
        for source in data.sources
        for unit in sources.list_units(source, data)
        for document in sources.read_unit(unit, source, data)
    ]
    return [document for document in read if isinstance(document, Document)]


def test_holds_the_documents_of_all_sources(corpus, whole):
    assert sorted(all_documents(whole)) == sorted(read_directly(corpus))
    assert whole.sources == ["code", "web"]
    assert list((whole.directory / "web").glob("*-0001.json")), "no unit of several chunks"
    assert [shard.source for shard in whole.shards()] == sorted(s.source for s in whole.shards())
    for part in records.PARTS:
        assert len(whole.shards("code", part)) >= 2 and len(whole.shards("web", part)) > 2
        documents = records.Documents(whole.shards(part=part))
        assert len(documents) == whole.documents(part)
        assert sum(len(documents[i].data) for i in range(len(documents))) == whole.num_bytes(part)
        held_out = [sources.is_held_out(documents[i].name, 0.3, 0) for i in range(len(documents))]
        assert held_out == [part == "validation"] * len(documents)
    with pytest.raises(KeyError, match=r"'wbe'.*\['code', 'web'\]"):
        whole.shards("wbe")


def test_tells_what_it_does_and_what_it_found(corpus, whole, tmp_path, capsys, monkeypatch):
    records.build(tmp_path / "silent", corpus)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    records.build(tmp_path, corpus)
    told = capsys.readouterr()
    *bars, last = told.err.splitlines()
    assert bars and "reading text:" in last and "100%" in last
    code, web = told.out.splitlines()
    assert code.startswith("records of code: train ") and code.endswith("0 bad records")
    assert "1 bad records (" in web and "not JSON" in web
    assert whole.bad["web"].count == 1 and whole.bad["web"].first[0].reason.startswith("not JSON")


CONTENTS = st.tuples(
    st.binary(max_size=40) | st.just("bad"), st.text(max_size=3) | st.sampled_from(LANGUAGES)
)


@settings(max_examples=15)
@given(st.lists(st.lists(CONTENTS, max_size=12), min_size=1, max_size=3), st.integers(1, 60))
def test_any_bytes_come_back_exactly_once(contents, shard_bytes):
    units = [
        [
            Bad(f"{u}/{i}", "why") if data == "bad" else Document(f"{u}/{i}", data, language)
            for i, (data, language) in enumerate(unit)
        ]
        for u, unit in enumerate(contents)
    ]
    expected = [record for unit in units for record in unit if isinstance(record, Document)]
    bad = [record for unit in units for record in unit if isinstance(record, Bad)]
    data = DataConfig(shard_bytes=shard_bytes, validation_fraction=0.3)
    with tempfile.TemporaryDirectory() as directory, FakeSources(units):
        store = records.build(directory, data)
        assert sorted(all_documents(store)) == sorted(expected)
        assert store.bad["text"] == (len(bad), bad[: len(store.bad["text"].first)])
        for part in records.PARTS:
            for shard in store.shards(part=part):
                counts = np.sum(list(shard.languages.values()), axis=0)
                assert tuple(counts) == (shard.documents, shard.num_bytes)
                assert shard.num_bytes < shard_bytes + 40
        add_entropies(store)
        assert all(
            len(d.entropies) == len(d.data) + 2 for d in all_documents(store, entropies=True)
        )
        languages = {("text", document.language) for document in expected}
        shards_of_all = [s for part in records.PARTS for s in store.shards(part=part)]
        assert set(records.score_histogram(shards_of_all)) == languages


def test_names_the_first_bad_records_and_counts_all(tmp_path):
    bad = [Bad(f"line {i}", "why") for i in range(50)]
    with FakeSources([bad[:10], bad[10:]]):
        store = records.build(tmp_path, DataConfig())
    assert store.bad["text"] == (50, bad[:20]) and not store.shards()
    marks = [json.loads(mark.read_bytes()) for mark in sorted(tmp_path.glob("text/*.json"))]
    assert [(mark["bad"], len(mark["first_bad"])) for mark in marks] == [(10, 10), (40, 20)]


def test_a_finished_store_needs_no_sources(tmp_path, monkeypatch):
    data = write_corpus(tmp_path / "corpus")
    before = records.build(tmp_path / "records", data)
    shutil.rmtree(tmp_path / "corpus")
    monkeypatch.setattr(records, "share", pytest.fail)  # There is nothing to do.
    assert records.build(tmp_path / "records", data) == before
    assert records.open_store(str(tmp_path / "records")) == before
    moved = shutil.move(before.directory, tmp_path / "elsewhere")
    assert len(all_documents(records.open_store(moved))) == sum(
        before.documents(part) for part in records.PARTS
    )


def changed(data: DataConfig, **kwargs) -> DataConfig:
    return DataConfig(**{**data.__dict__, **kwargs})


def test_refuses_other_settings(corpus, store):
    for kwargs, message in (
        (dict(seed=3), "data.seed: 0 there, 3 here"),
        (dict(max_bytes=10), "data.max_bytes: None there, 10 here"),
        (dict(suffixes=(".py",)), r"data.suffixes: \[.*\] there, \['.py'\] here"),
        (dict(sources=corpus.sources[:1]), r"data.sources\[1\]: {.*'web'.*} there, None here"),
        (
            dict(sources=(corpus.sources[0], SourceConfig("web", "other"))),
            r"data.sources\[1\].path: '.*web' there, 'other' here",
        ),
    ):
        with pytest.raises(ValueError, match=f"{message}; use those, or make records in another"):
            records.build(store.directory, changed(corpus, **kwargs))
    endings = tuple(SourceConfig(s.name, s.path, suffixes=(".txt",)) for s in corpus.sources)
    with pytest.raises(
        ValueError, match=r"data.sources\[0\].suffixes: None there, \['.txt'\] here"
    ):
        records.build(store.directory, changed(corpus, sources=endings))
    # Records that are older than the setting know nothing of it.
    assert "suffixes" not in records.load(store.directory / records.STORE)["data"]["sources"][0]
    weighted = tuple(SourceConfig(s.name, s.path, weight=2.0) for s in corpus.sources)
    # These decide no document.
    assert records.build(store.directory, changed(corpus, sources=weighted, workers=3)) == store


def test_what_cannot_be_opened(corpus, store, tmp_path):
    for bucket in ("s3://bucket/records", "az://bucket/records"):
        with pytest.raises(ValueError, match="only buckets of Google Cloud Storage will do"):
            records.build(bucket, corpus)
        with pytest.raises(ValueError, match="only buckets of Google Cloud Storage will do"):
            records.open_store(bucket)
    with pytest.raises(FileNotFoundError, match=r"no records in '.*nowhere': make them"):
        records.open_store(tmp_path / "nowhere")
    index = store.directory / "index.json"
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"index.json is damaged .*: delete it and run"):
        records.open_store(store.directory)
    index.unlink()
    assert records.open_store(store.directory) == store  # from the marks
    (store.directory / "web" / "00000-0000.json").unlink()
    with pytest.raises(ValueError, match=r"unfinished: run bltjax.preprocess again"):
        records.open_store(store.directory)
    assert records.build(store.directory, corpus) == store
    checked_json.write_checked(store.directory / "store.json", dict(format=3, data={}, units={}))
    with pytest.raises(ValueError, match="has format 3, this program reads 1 to 2"):
        records.open_store(store.directory)


def test_a_damaged_shard_is_told_and_made_anew(corpus, whole, store):
    shard = store.shards("web")[1]
    shard.path.write_bytes(shard.path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"is damaged \(\d+ bytes of \d+\): delete it and") as told:
        records.open_store(store.directory)
    Path(str(told.value).split(" is damaged")[0]).unlink()
    again = records.build(store.directory, corpus)
    lacking = [s for s in again.all_shards if not records.has_entropies(s)]
    assert {Path(s.stem).name for s in lacking} == {Path(shard.stem).name}  # of the same chunk
    add_entropies(again)
    assert files_of(store.directory) == files_of(whole.directory)


def test_bad_records_may_be_fatal(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"bad record '.*' of source 'web': not JSON.*; mend it"):
        records.build(tmp_path, changed(corpus, bad_records="fail"))


def test_one_model_gives_all_entropies(store):
    model = {"config": {"dim": 64, "windows": (1, 2)}, "digest": "ab"}
    records.claim_entropies(store, model)
    records.claim_entropies(store, model)
    other = {**model, "config": {"dim": 32, "windows": (1, 2)}}
    with pytest.raises(
        ValueError, match=r"another model: model.config.dim: 64 there, 32 here; use that"
    ):
        records.claim_entropies(store, other)


def test_the_digest_of_a_store_tells_its_documents_apart(corpus, whole, store):
    assert store.digest() == whole.digest()  # in another directory
    index = json.loads((store.directory / "index.json").read_bytes())
    index["shards"][0]["documents"] += 1
    changed = store._replace(
        all_shards=[records.below(store.directory, s) for s in index["shards"]]
    )
    assert changed.digest() != whole.digest()
    assert store._replace(all_shards=store.all_shards[1:]).digest() != whole.digest()
