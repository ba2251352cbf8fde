"""Builds and opens a store of records: the corpus, read once for all training.

    store.json                          the settings and the units of reading
    SOURCE/PART/UNIT-0000.array_record  documents (bltjax/data/records/shards.py)
    SOURCE/UNIT-0000.json               marks a complete chunk (bltjax/data/records/writing.py)
    index.json                          all shards, once all units are complete; from the marks
    entropies.json                      identifies the model that the entropies are from

PART is one of PARTS. A file that is being written has the suffix `.partial`; others are complete.
Each may be deleted, and is made anew by the run that makes the records, with what depends on it.
Version 0.1 wrote format 1, without digests and without the states of files; it is read as it is.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bltjax.config import differences
from bltjax.config.chat import ChatConfig
from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data import on_ray
from bltjax.data.records import source_files, writing
from bltjax.data.records.shards import Documents as Documents  # shards are reached here too
from bltjax.data.records.shards import Shard as Shard
from bltjax.data.records.shards import damaged, drop_entropies, size_of
from bltjax.data.records.shards import has_entropies as has_entropies
from bltjax.data.records.shards import model_of as model_of
from bltjax.data.records.shards import score_histogram as score_histogram
from bltjax.data.records.shards import without_entropies as without_entropies
from bltjax.data.records.shards import write_entropies as write_entropies
from bltjax.data.records.writing import NAMED_BAD, PARTS, Task, below, intact, load, lock_of
from bltjax.data.sources import units as sources
from bltjax.data.sources.units import Bad, Unit
from bltjax.runtime import object_cache, system_errors
from bltjax.runtime.checked_json import digest, write_checked
from bltjax.runtime.files import share
from bltjax.runtime.paths import as_path, exists, is_remote, remove
from bltjax.runtime.plain_files import check_utf8
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import printable_name

FORMAT = 2
STORE, INDEX, ENTROPIES = "store.json", "index.json", "entropies.json"


class NoRecords(FileNotFoundError):
    """Raised where there is no store."""


class Unfinished(ValueError):
    """Raised where a store lacks something that reading its sources will give."""

    def __init__(self, directory: Path, what: str):
        super().__init__(
            f"the records in {str(directory)!r} are unfinished: run bltjax.preprocess again with "
            f"the same settings, it goes on where it stopped ({what})"
        )


class BadRecords(NamedTuple):
    """Records of a source that could not be read: their number, and the first of them."""

    count: int
    first: list[Bad]


class Store(NamedTuple):
    """A finished store of records."""

    directory: Path
    sources: list[str]  # in the order of the configuration
    all_shards: list[Shard]  # in the order of sources, units and chunks
    bad: dict[str, BadRecords]  # by source
    chat: tuple[ChatConfig | None, ...] = ()  # of each source: its turns; None: no conversations

    def shards(self, source: str | None = None, part: str = "train") -> list[Shard]:
        """Returns the shards of a part, of one source or of all; KeyError for an unknown source."""
        if source is not None and source not in self.sources:
            raise KeyError(f"no source {source!r} in {self.directory}: it has {self.sources}")
        return [s for s in self.all_shards if s.part == part and source in (None, s.source)]

    def documents(self, part: str = "train") -> int:
        return sum(shard.documents for shard in self.shards(part=part))

    def num_bytes(self, part: str = "train") -> int:
        return sum(shard.num_bytes for shard in self.shards(part=part))

    def digest(self) -> str:
        """Returns 32 hexadecimal digits that tell corpora apart, wherever their files are."""
        omitted = {"file_bytes"}  # depends on the version of ArrayRecord
        if not all(shard.digest for shard in self.all_shards):
            omitted.add("digest")  # a shard of version 0.1 that was made anew has one
        stems = (os.path.relpath(shard.stem, self.directory) for shard in self.all_shards)
        described = (
            shard._asdict() | {"stem": stem}
            for shard, stem in zip(self.all_shards, stems, strict=True)
        )
        return digest([{k: v for k, v in d.items() if k not in omitted} for d in described])

    def lock(self, shard: Shard) -> Path:
        """Returns the lock file of a shard, for `files.share`."""
        return lock_of(self.directory, os.path.relpath(shard.stem, self.directory))


def build(
    directory: str | os.PathLike, data: DataConfig, cluster: on_ray.Cluster | None = None
) -> Store:
    """Reads the sources of `data` into a store, or goes on with one, or opens a finished one.

    Several processes may build one store at once (see `files.share`), and those of a cluster may
    help. What was deleted of a store is made anew. Raises ValueError for a store made with other
    settings, sources that have changed meanwhile and, under bad_records="fail", a bad record.
    """
    directory = _path(directory)
    try:
        store = open_store(directory, data) if exists(directory / INDEX) else None
    except (NoRecords, Unfinished):
        store = None
    if store is None:
        _make(directory, data, cluster)
        store = open_store(directory, data)
    left_out = load(directory / STORE).get("left_out", {})  # older stores do not tell
    for source in store.sources:
        lines = [_summary(store, source), *left_out.get(source, [])]
        print("\n".join(map(printable_name, lines)), flush=True)
    return store


def _make(directory: Path, data: DataConfig, cluster: on_ray.Cluster | None):
    """Records the units that are not whole, and lists the shards."""
    _write_once(directory / STORE, lambda: _plan(data))
    stored = _read_store(directory, data)
    tasks = _unchanged(directory, _tasks(directory, stored, data.named_sources()), data)
    with system_errors.writing(directory / INDEX):
        remove(directory / INDEX)
    sizes = [task.unit.size for task in tasks]
    # Processes take units in one order: what lies before this one's is done or being done.
    before = dict(
        zip([t.name for t in tasks], itertools.accumulate(sizes, initial=0), strict=False)
    )
    bar = progress_bar("reading text", sum(sizes))

    def show(task: Task, unit_bytes: int):
        bar.update(max(before[task.name] + min(unit_bytes, task.unit.size) - bar.n, 0))

    if cluster:
        cluster.record_units(directory, tasks, data, lambda task: bar.update(task.unit.size))
    else:
        writing.record_units(directory, tasks, data, show)
    bar.close()
    _write_once(directory / INDEX, lambda: _index(stored, tasks, directory))


def _unchanged(directory: Path, tasks: list[Task], data: DataConfig) -> list[Task]:
    """Returns tasks with the states that their files have now; ValueError where a text is another.

    Of a file that units left to do will read, everything that is recorded already is compared.
    """
    now = {
        task.name: source_files.states(task.unit)
        for task, chunks in zip(tasks, writing.chunks_of_all(directory, tasks), strict=True)
        if not writing.is_whole(chunks)
    }
    paths: set[str] = set()
    for task in tasks:
        if task.name in now:
            paths.update(source_files.touched(directory, task, now[task.name]))
    for task in tasks:
        if of_task := sorted(paths.intersection(task.unit.paths)):
            writing.check_unit(directory, task, data, of_task)
    return [task._replace(states=now.get(task.name, task.states)) for task in tasks]


def open_store(directory: str | os.PathLike, data: DataConfig | None = None) -> Store:
    """Opens a finished store; its sources need not be there any more.

    Raises NoRecords where there is none, Unfinished where something of it is missing, and
    ValueError where it is damaged, or was made with other settings than those of `data`.
    """
    directory = _path(directory)
    if not exists(directory / STORE):
        raise NoRecords(
            f"no records in {str(directory)!r}: make them with bltjax.preprocess, or give the "
            f"directory that holds {STORE}"
        )
    stored = _read_store(directory, data)
    index = _read_index(directory, stored)
    with intact(directory / INDEX):
        shards = [below(directory, shard) for shard in index["shards"]]
        bad = {}
        for name in stored["units"]:
            count, first = index["bad"][name]
            bad[name] = BadRecords(count, [Bad(*record) for record in first])
        for shard in shards:
            if shard.source not in bad or shard.part not in PARTS:
                raise ValueError(f"a shard of {shard.source!r}, {shard.part!r}")
    if is_remote(directory):
        object_cache.learn(directory)
    for shard in shards:
        if not writing.is_there(shard):
            raise Unfinished(directory, f"{shard.path}, or what belongs to it, is missing")
        size = size_of(shard.path)
        if size != shard.file_bytes:
            raise damaged(shard.path, f"{size} bytes of {shard.file_bytes}")
    return Store(directory, list(stored["units"]), shards, bad, _chat(stored["data"]))


def _chat(made_with: dict) -> tuple[ChatConfig | None, ...]:
    """Returns how turns look in each source of a store; () where none holds conversations."""
    if "chat" not in made_with:
        return ()
    turns = ChatConfig(**made_with["chat"])
    return tuple(turns if s["kind"] == "chat" else None for s in made_with["sources"])


def claim_entropies(store: Store, model: dict) -> str:
    """Records the model that the store's entropies are from; returns its digest.

    model: a JSON object that identifies a model. Entropies of other models, which are there if the
    record of these was deleted, are deleted. Raises ValueError where another model is recorded.
    """
    path, ours = store.directory / ENTROPIES, digest(model)

    def claim():
        for shard in filter(has_entropies, store.all_shards):
            if model_of(shard) not in ("", ours):
                drop_entropies(shard)
        return {"model": model}

    _write_once(path, claim)
    try:
        stored = load(path)
        stored = stored.get("model", stored)  # as version 0.1 wrote it
    except ValueError as error:
        raise damaged(path, str(error.__cause__), f"delete it{_others(store)}") from error
    if changed := differences(stored, json.loads(json.dumps(model)), "model", skipped=()):
        raise ValueError(
            f"the entropies in {str(store.directory)!r} are of another model: {changed[0]}; use "
            f"that model, or delete {path}{_others(store)} and run it again"
        )
    return ours


def _others(store: Store) -> str:
    """Returns what to delete beside entropies.json: those that do not say which model made them."""
    known = all(model_of(shard) for shard in filter(has_entropies, store.all_shards))
    return "" if known else " and all *.entropies.array_record there"


def _plan(data: DataConfig) -> dict:
    """Returns the content of store.json: settings that select documents, and units of reading."""
    surveys = {source.name: sources.survey(source, data) for source in data.named_sources()}
    units = {
        name: [unit._asdict() | {"states": source_files.states(unit)} for unit in found]
        for name, (found, _) in surveys.items()
    }
    left_out = {name: sentences for name, (_, sentences) in surveys.items()}
    return {"format": FORMAT, "data": _settings(data), "units": units, "left_out": left_out}


def _tasks(directory: Path, stored: dict, configs: Iterable[SourceConfig]) -> list[Task]:
    """Returns the units of a plan; `configs` are those of its sources."""
    by_name, tasks = {config.name: config for config in configs}, []
    for name, units in stored["units"].items():
        for fields in units:
            key = digest([stored["data"], name, fields]) if stored["format"] > 1 else ""
            with intact(directory / STORE):
                fields = dict(fields)
                states = fields.pop("states", [])
                unit = Unit(**{**fields, "paths": tuple(fields["paths"])})
                tasks.append(Task(by_name[name], unit, key, states))
    return tasks


def _settings(data: DataConfig) -> dict:
    """Returns the settings that select documents and decide how they are sharded."""
    settings = {
        name: value
        for name, value in dataclasses.asdict(data).items()
        if name not in ("root", "sources", "records", "workers", "cache", "cache_bytes")
    }
    if settings["max_document_bytes"] is None:  # records that are older than this setting
        del settings["max_document_bytes"]
    if all(source.kind != "chat" for source in data.named_sources()):
        del settings["chat"]
    settings["sources"] = [dataclasses.asdict(source) for source in data.named_sources()]
    for source in settings["sources"]:
        del source["weight"]
        if not source["suffixes"]:  # and than this one
            del source["suffixes"]
    return json.loads(json.dumps(settings))


def _read_store(directory: Path, data: DataConfig | None) -> dict:
    stored = load(directory / STORE)
    with intact(directory / STORE):
        made_with, _ = stored["data"], stored["units"].items()
        number = int(stored["format"])
    if not 1 <= number <= FORMAT:
        raise ValueError(
            f"{directory / STORE} has format {number}, this program reads 1 to {FORMAT}: make the "
            "records anew in another directory"
        )
    changed = data and differences(made_with, _settings(data), "data", skipped=())
    if changed:
        raise ValueError(
            f"the records in {str(directory)!r} were made with other settings: {changed[0]}; use "
            "those, or make records in another directory"
        )
    return stored


def _read_index(directory: Path, stored: dict) -> dict:
    """Returns the content of index.json, or the same from the marks where it is missing."""
    path = directory / INDEX
    try:
        index = load(path) if exists(path) else None
    except OSError:
        if exists(path):
            raise
        index = None  # Another process has just deleted it, to write it anew.
    if index is not None and index.get("plan", "") == _name_of(stored):
        return index
    return _index(stored, _tasks(directory, stored, map(SourceConfig, stored["units"])), directory)


def _index(stored: dict, tasks: Sequence[Task], directory: Path) -> dict:
    """Returns the content of index.json, from the marks; Unfinished where some are missing."""
    shards, bad = [], {name: (0, []) for name in stored["units"]}
    for task, chunks in zip(tasks, writing.chunks_of_all(directory, tasks), strict=True):
        count, first = bad[task.source.name]
        if not writing.is_whole(chunks):
            raise Unfinished(directory, f"a part of {task.name} is missing")
        for chunk in chunks:
            shards += chunk["shards"]
            count, first = count + chunk["bad"], (first + chunk["first_bad"])[:NAMED_BAD]
        bad[task.source.name] = (count, first)
    return {"shards": shards, "bad": bad, "plan": _name_of(stored)}


def _name_of(stored: dict) -> str:
    """Returns what an index repeats of its plan; "" in version 0.1."""
    return digest(stored) if stored["format"] > 1 else ""


def _summary(store: Store, source: str) -> str:
    parts = []
    for part in PARTS:
        shards = store.shards(source, part)
        documents, num_bytes = sum(s.documents for s in shards), sum(s.num_bytes for s in shards)
        parts.append(f"{part} {documents} documents, {num_bytes / 1e6:.1f} MB")
    bad = store.bad[source]
    named = "; ".join(sources.grouped(bad.first))
    first = f"the first {len(bad.first)}: " if bad.count > len(bad.first) else ""
    parts.append(f"{bad.count} bad records" + (f" ({first}{named})" if named else ""))
    return f"records of {source}: " + ", ".join(parts)


def _write_once(path: Path, make: Callable[[], dict]):
    """Writes the content that `make` returns, unless this or another process has."""
    lock = lock_of(path.parent, path.name)
    share([path], exists, lambda path: write_checked(path, make()), lambda _: lock)


def _path(directory: str | os.PathLike) -> Path:
    """Returns the directory. Raises ValueError or OSError where nothing can be read there."""
    check_utf8(directory)
    return as_path(directory)
