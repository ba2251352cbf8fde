"""A store with a flipped bit, on a full disk, or of a source that changes: one line, then right."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.records import store as records
from bltjax.data.sources.units import Document
from bltjax.runtime import checked_json
from bltjax.runtime.system_errors import UnwritableError
from tests.record_stores import FakeSources, entropies_of, files_of

MODEL, OTHER = dict(config="ours"), dict(config="another")
DAMAGE = {  # of the bytes of a file, at a place and a bit
    "flipped": lambda raw, at, bit: raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :],
    "flipped again": lambda raw, at, bit: DAMAGE["flipped"](raw, at, bit),
    "flipped once more": lambda raw, at, bit: DAMAGE["flipped"](raw, at, bit),
    "cut": lambda raw, at, bit: raw[:at],
    "emptied": lambda raw, at, bit: b"",
    "blank": lambda raw, at, bit: bytes(len(raw)),
    "noise from here on": lambda raw, at, bit: raw[:at] + b"\xd5\x0f" * ((len(raw) - at) // 2),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> DataConfig:
    """Text files, and a file of JSON lines that is cut into several units."""
    root, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    (root / "text").mkdir()
    for i in range(4):
        (root / f"text/{i}.txt").write_bytes(rng.bytes(150))
    lines = [json.dumps(dict(text=f"{i} " * 20, id=i, lang="de" * (i % 2))) for i in range(24)]
    (root / "lines.jsonl").write_text("\n".join([*lines, "{broken"]))
    return config_of(root)


def config_of(root: Path) -> DataConfig:
    sources = (
        SourceConfig("text", str(root / "text")),
        SourceConfig("lines", str(root / "lines.jsonl")),
    )
    return DataConfig(sources=sources, shard_bytes=700, validation_fraction=0.3)


def finish(directory: Path, data: DataConfig, model=MODEL) -> records.Store:
    """Does what a run does to its records: makes what is missing of them, and entropies."""
    store = records.build(directory, data)
    name = records.claim_entropies(store, model)
    for shard in store.all_shards:
        if not records.has_entropies(shard):
            records.write_entropies(shard, entropies_of(shard), name)
    return store


def content(store: records.Store) -> tuple:
    """What a run can read of its records."""
    read = [
        (document.name, document.data, document.language, document.entropies.tobytes())
        for shard in store.all_shards
        for document in records.Documents([shard], entropies=True)
    ]
    scores = {
        key: [(name, array.tolist()) for name, array in histogram.arrays().items()]
        for key, histogram in records.score_histogram(store.all_shards).items()
    }
    return read, scores, store.bad, store.sources, store.digest()


@pytest.fixture(scope="module")
def made(texts, tmp_path_factory) -> records.Store:
    """A finished store with entropies; not to be changed."""
    store = finish(tmp_path_factory.mktemp("made"), texts)
    assert {Path(s.stem).name for s in store.shards("lines")} > {"00000-0000", "00001-0000"}
    return store


KINDS = {
    "store.json": "store.json",
    "index.json": "index.json",
    "entropies.json": "entropies.json",
    "mark": "*/*.json",
    "documents": "*/*/*-0000.array_record",
    "entropies": "*/*/*.entropies.array_record",
    "scores": "*/*/*.scores.npz",
}


@pytest.mark.parametrize("kind", KINDS)
def test_after_damage_the_advice_works(texts, made, tmp_path, kind):
    """Nothing is wrong, or one line says what to delete, and the next run gives what was there."""
    expected, rng, told = content(made), random.Random(kind), 0
    for damage in DAMAGE.values():
        directory = shutil.copytree(made.directory, tmp_path / "damaged")
        if kind == "mark":  # which are read where there is no index
            (directory / "index.json").unlink()
        path = rng.choice(sorted(directory.glob(KINDS[kind])))
        raw = path.read_bytes()
        used = np.flatnonzero(np.frombuffer(raw, np.uint8))
        path.write_bytes(damage(raw, rng.choice(used), rng.randrange(8)))
        try:
            found = content(finish(directory, texts))
        except ValueError as error:
            told += 1
            assert str(error).startswith(f"{path} is damaged (") and "\n" not in str(error)
            assert str(error).count("is damaged") == 1
            assert "): delete it and run bltjax.preprocess or bltjax.train again" in str(error)
            path.unlink()
            found = content(finish(directory, texts))
        assert found == expected, path
        shutil.rmtree(directory)
    assert told >= len(DAMAGE) - 3  # Some flips change nothing.


def test_every_bit_of_a_json_file_counts(tmp_path):
    value = dict(format=2, name="ä", numbers=[1, 2.5, None, True])
    checked_json.write_checked(tmp_path / "a.json", value)
    whole = (tmp_path / "a.json").read_bytes()
    assert checked_json.read_checked(tmp_path / "a.json") == value
    for bit in range(0, 8 * len(whole), 3):  # 3 and 8 are coprime
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.json").write_bytes(raw)
        try:
            assert checked_json.read_checked(tmp_path / "a.json") == value  # another blank
        except ValueError as error:
            assert re.match("not JSON|not a JSON object|its digest is of another", str(error))


def test_scores_of_other_documents_are_told(made, tmp_path, texts):
    store = records.open_store(shutil.copytree(made.directory, tmp_path / "records"))
    one, other = store.shards()[:2]
    shutil.copy(one.scores_path, other.scores_path)
    with pytest.raises(ValueError, match=rf"{other.scores_path} is damaged \(.*\): delete it and"):
        records.score_histogram(store.shards())
    other.scores_path.unlink()
    assert content(store) == content(made)


def test_a_claim_that_was_deleted_is_written_anew(made, tmp_path, texts):
    directory = shutil.copytree(made.directory, tmp_path / "records")
    with pytest.raises(ValueError, match=r"of another model: .*, or delete \S+/entropies.json and"):
        finish(directory, texts, OTHER)
    (directory / "entropies.json").unlink()
    store = records.open_store(directory)
    records.claim_entropies(store, MODEL)
    assert all(map(records.has_entropies, store.all_shards))
    (directory / "entropies.json").unlink()
    records.claim_entropies(store, OTHER)
    assert not any(map(records.has_entropies, store.all_shards))


def as_of_0_1(directory: Path):
    """Turns a store into what version 0.1 wrote: no digests, no states of files, format 1."""
    for path in [*directory.glob("*.json"), *directory.glob("*/*.json")]:
        value = checked_json.read_checked(path)
        for name in ("unit", "content", "plan"):
            value.pop(name, None)
        for shard in value.get("shards", ()):
            del shard["digest"], shard["with_entropies"]
        for unit in (unit for of in value.get("units", {}).values() for unit in of):
            del unit["states"]
        if "format" in value:
            value["format"] = 1
        value = value.get("model", value)
        path.write_text(json.dumps(value))
    for path in directory.glob("*/*/*.scores.npz"):
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files if name != "model"}
        np.savez_compressed(path, **arrays)


def test_a_store_of_version_0_1_opens_and_goes_on(made, tmp_path, texts):
    expected = content(made)
    directory = shutil.copytree(made.directory, tmp_path / "records")
    as_of_0_1(directory)
    old = records.open_store(directory)
    assert content(finish(directory, texts))[:-1] == content(old)[:-1] == expected[:-1]
    for name in ("index.json", "lines/00001-0000.json"):
        (directory / name).unlink()
    again = finish(directory, texts)
    assert content(again)[:-1] == expected[:-1] and again.digest() == old.digest()
    (directory / "entropies.json").write_text("{")
    with pytest.raises(ValueError, match=r"delete it and all \*.entropies.array_record there and"):
        finish(directory, texts)


OLD_DAMAGE = [
    ("index.json", lambda index: index["shards"][0].pop("documents"), "no 'documents'|documents"),
    ("index.json", lambda index: index.pop("shards"), "no 'shards'"),
    ("index.json", lambda index: index["bad"].update(text=3), "int"),
    ("index.json", lambda index: index["bad"].pop("text"), "no 'text'"),
    ("index.json", lambda index: index["shards"][0].update(part="trein"), "'trein'"),
    ("index.json", lambda index: index["shards"][0].update(source="tezt"), "'tezt'"),
    ("lines/00000-0000.json", lambda mark: mark.pop("last"), "no 'last'"),
    ("lines/00000-0000.json", lambda mark: mark.update(records="7"), "records is '7'"),
    ("store.json", lambda store: store.pop("units"), "no 'units'"),
    ("store.json", lambda store: store["units"].update(tezt=store["units"].pop("text")), "'tezt'"),
    ("store.json", lambda store: store["units"]["text"][0].pop("paths"), "no 'paths'"),
]


@pytest.mark.parametrize("name, change, reason", OLD_DAMAGE)
def test_what_cannot_be_is_told_without_digests(made, tmp_path, texts, name, change, reason):
    directory = shutil.copytree(made.directory, tmp_path / "records")
    as_of_0_1(directory)
    value = json.loads((directory / name).read_bytes())
    change(value)
    (directory / name).write_text(json.dumps(value))
    if name != "index.json":
        (directory / "index.json").unlink()
    with pytest.raises(
        ValueError, match=rf"{name} is damaged \(.*({reason}).*\): delete it and run"
    ):
        records.build(directory, texts)


FULL = [
    "store", "text/*", "lines/00001-*", "lines/train/*", "lines/validation/*", "index",
    "lines/train/*.entropies", "text/train/*.scores", "entropies",
]  # fmt: skip


@pytest.mark.parametrize("place", FULL)
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(texts, made, tmp_path, place):
    """The file that is written first at this place is on a device without room."""
    suffixes = (".json", ".array_record", ".npz")
    names = [n for n in files_of(made.directory) if n.endswith(suffixes)]
    partial = sorted({Path(n).with_suffix(".partial") for n in names})
    name = next(n for n in partial if n.match(f"{place}.partial"))
    target = tmp_path / "records" / name
    target.parent.mkdir(parents=True)
    target.symlink_to("/dev/full")
    with pytest.raises(UnwritableError) as told:
        finish(tmp_path / "records", texts)
    stem = str(target.with_suffix(""))
    reason = r"\(No space left on device\): free some disk space and run it again"
    assert re.fullmatch(rf"cannot write {stem}\S* {reason}", str(told.value))
    assert content(finish(tmp_path / "records", texts)) == content(made)
    assert files_of(tmp_path / "records").keys() == files_of(made.directory).keys()


def test_a_file_that_cannot_be_read_is_not_called_damaged(made, monkeypatch):
    shard = made.shards()[0]._replace(stem=str(made.directory / "gone"))
    for read in (lambda: records.Documents([shard])[0], lambda: records.open_store("/dev/null")):
        with pytest.raises(OSError, match=r"cannot read \S+ \(No such .*put it back|no records in"):
            read()


@pytest.fixture
def interrupted(texts, made, tmp_path) -> tuple[DataConfig, Path]:
    """A corpus of one's own, and its records, of which the middle of `lines` is not there yet."""
    root = Path(texts.sources[1].path).parent
    shutil.copytree(root, tmp_path / "texts")  # keeps the times of files
    data = config_of(tmp_path / "texts")
    finish(tmp_path / "records", data)
    for name in ("index.json", "lines/00001-0000.json"):
        (tmp_path / "records" / name).unlink()
    return data, tmp_path / "records"


def replace(path: Path, old: bytes, new: bytes):
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


CHANGES = {
    "appended": lambda path: replace(path, b"{broken", b'{broken\n{"text": "more"}'),
    "inserted": lambda path: path.write_bytes(b'{"text": "first"}\n' + path.read_bytes()),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "gone": lambda path: path.unlink(),
    "of the same size": lambda path: replace(path, b"7 7 7", b"7 X 7"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_between_two_runs_is_refused(interrupted, change):
    data, directory = interrupted
    path = Path(data.sources[1].path)
    state, whole = os.stat(path), path.read_bytes()
    parts = [json.loads(m.read_bytes())["records"] for m in sorted(directory.glob("lines/*.json"))]
    if change == "of the same size":  # in a part that is recorded already
        assert parts[0] > 7
    CHANGES[change](path)
    before = files_of(directory)
    refused = (
        rf"{path} of source 'lines' has changed or gone since the records in '{directory}' were "
        "begun: put it back as it was, or delete that directory and make the records anew"
    )
    for _ in range(2):  # It stays refused.
        with pytest.raises(ValueError, match=refused) as told:
            records.build(directory, data)
        assert "\n" not in str(told.value)
    assert files_of(directory) == before
    # Either remedy works.
    copy = shutil.copytree(directory, directory.parent / "copy")
    changed = path.read_bytes() if path.exists() else None
    path.write_bytes(whole)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    names = sorted(document[0] for document in content(finish(copy, data))[0])
    assert len(names) == len(set(names)) == 4 + 24
    if changed is not None:
        path.write_bytes(changed)
        shutil.rmtree(directory)
        read = [document[1] for document in content(finish(directory, data))[0]]
        whole_lines = re.findall(rb'^\{"text.*\}$', changed, re.MULTILINE)
        assert len(read) == len(set(read)) == 4 + len(whole_lines)


def test_a_copy_of_a_source_with_new_times_will_do(interrupted, made):
    data, directory = interrupted
    for path in [Path(data.sources[1].path), *Path(data.sources[0].path).iterdir()]:
        os.utime(path)
    assert sorted(content(finish(directory, data))[0]) == sorted(content(made)[0])
    for source in data.sources:  # A finished store needs none.
        path = Path(source.path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finish(directory, data)


def test_a_source_that_changes_while_it_is_read_is_refused(interrupted, monkeypatch):
    data, directory = interrupted
    path, read_unit = Path(data.sources[1].path), records.sources.read_unit

    def changing(unit, source, data):
        for record in read_unit(unit, source, data):
            os.utime(path)
            yield record

    with monkeypatch.context() as patched:
        patched.setattr(records.sources, "read_unit", changing)
        with pytest.raises(ValueError, match=f"{path} of source 'lines' has changed"):
            records.build(directory, data)
    assert not (directory / "lines/00001-0000.json").exists()
    records.build(directory, data)


def test_a_part_that_is_made_anew_of_another_text_is_not_kept(tmp_path):
    """Where neither size nor time tell, what follows in the same unit does."""
    unit = [Document(str(i), bytes([i]) * 60) for i in range(10)]
    data = DataConfig(shard_bytes=100)
    with FakeSources([unit]):
        expected = files_of(records.build(tmp_path, data).directory)
    for name in ("index.json", "text/u0-0000.json"):
        (tmp_path / name).unlink()
    with (
        FakeSources([[document._replace(data=b"x" * 60) for document in unit]]),
        pytest.raises(ValueError, match="part u0 of source 'text' has changed"),
    ):
        records.build(tmp_path, data)
    with FakeSources([unit]):
        records.build(tmp_path, data)
    assert files_of(tmp_path) == expected
