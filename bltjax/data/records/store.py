"""Builds and opens a store of records: the corpus, read once for all training.

    store.json                          the settings and the units of reading
    SOURCE/PART/UNIT-0000.array_record  documents (bltjax/data/records/shards.py)
    SOURCE/UNIT-0000.json               marks a complete chunk (bltjax/data/records/writing.py)
    index.json                          all shards, once all units are complete
    entropies.json                      identifies the model that the entropies are from

PART is one of PARTS. A file that is being written has the suffix `.partial`; others are complete.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from bltjax.config import differences
from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.records import writing
from bltjax.data.records.shards import Documents as Documents  # shards are reached here too
from bltjax.data.records.shards import Shard as Shard
from bltjax.data.records.shards import has_entropies as has_entropies
from bltjax.data.records.shards import score_histogram as score_histogram
from bltjax.data.records.shards import write_entropies as write_entropies
from bltjax.data.records.writing import NAMED_BAD, PARTS, below, load
from bltjax.data.sources import units as sources
from bltjax.data.sources.units import Bad, Unit
from bltjax.runtime.checked_json import digest
from bltjax.runtime.files import share, write_json
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import printable_name

FORMAT = 1
STORE, INDEX, ENTROPIES = "store.json", "index.json", "entropies.json"


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
        return digest([shard.identity(self.directory) for shard in self.all_shards])

    def lock(self, shard: Shard) -> Path:
        """Returns the lock file of a shard, for `files.share`."""
        return _lock(self.directory, os.path.relpath(shard.stem, self.directory))


def build(directory: str | os.PathLike, data: DataConfig) -> Store:
    """Reads the sources of `data` into a store, or goes on with one, or opens a finished one.

    Several processes may build one store at once (see `files.share`). Raises ValueError for a store
    made with other settings, a directory in a bucket and, under bad_records="fail", a bad record.
    """
    directory = _local(directory)
    if not (directory / INDEX).exists():
        _write_once(directory / STORE, lambda: _plan(data))
        stored = _read_store(directory, data)
        configs = {source.name: source for source in data.named_sources()}
        tasks = [
            (configs[name], Unit(**{**unit, "paths": tuple(unit["paths"])}))
            for name, units in stored["units"].items()
            for unit in units
        ]
        sizes = [unit.size for _, unit in tasks]
        # Processes take units in one order: what lies before this one's is done or being done.
        before = dict(zip(tasks, itertools.accumulate(sizes, initial=0), strict=False))
        bar = progress_bar("reading text", sum(sizes))

        def record(task: tuple[SourceConfig, Unit]):
            for unit_bytes in writing.record_unit(directory, *task, data):
                bar.update(max(before[task] + min(unit_bytes, task[1].size) - bar.n, 0))

        share(
            tasks,
            is_done=lambda task: writing.is_whole(directory, *task),
            do=record,
            lock=lambda task: _lock(directory, f"{task[0].name}/{task[1].name}"),
        )
        bar.close()
        _write_once(directory / INDEX, lambda: _index(directory, tasks))
    store = open_store(directory, data)
    left_out = load(directory / STORE).get("left_out", {})  # older stores do not tell
    for source in store.sources:
        lines = [_summary(store, source), *left_out.get(source, [])]
        print("\n".join(map(printable_name, lines)), flush=True)
    return store


def open_store(directory: str | os.PathLike, data: DataConfig | None = None) -> Store:
    """Opens a finished store; its sources need not be there any more.

    Raises FileNotFoundError where there is none, ValueError where it is unfinished or damaged, or
    was made with other settings than those of `data`.
    """
    directory = _local(directory)
    if not (directory / STORE).exists():
        raise FileNotFoundError(
            f"no records in {str(directory)!r}: make them with bltjax.preprocess, or give the "
            f"directory that holds {STORE}"
        )
    stored = _read_store(directory, data)
    if not (directory / INDEX).exists():
        raise ValueError(
            f"the records in {str(directory)!r} are unfinished: run bltjax.preprocess again with "
            "the same settings, it goes on where it stopped"
        )
    index = load(directory / INDEX)
    shards = [below(directory, shard) for shard in index["shards"]]
    for shard in shards:
        size = shard.path.stat().st_size if shard.path.exists() else 0
        if size != shard.file_bytes:
            mark = directory / shard.source / f"{Path(shard.stem).name}.json"
            raise ValueError(
                f"{shard.path} is damaged ({size} bytes of {shard.file_bytes}): delete {mark} and "
                f"{directory / INDEX}, and run bltjax.preprocess again, which makes it anew"
            )
    bad = {
        name: BadRecords(count, [Bad(*record) for record in first])
        for name, (count, first) in index["bad"].items()
    }
    return Store(directory, list(stored["units"]), shards, bad)


def claim_entropies(store: Store, model: dict):
    """Records the model that the store's entropies are from; ValueError if it is another one.

    model: a JSON object that identifies a model.
    """
    path = store.directory / ENTROPIES
    _write_once(path, lambda: model)
    if changed := differences(load(path), json.loads(json.dumps(model)), "model", skipped=()):
        raise ValueError(
            f"the entropies in {str(store.directory)!r} are of another model: {changed[0]}; use "
            f"that model, or delete {ENTROPIES} and all *.entropies.array_record there"
        )


def _plan(data: DataConfig) -> dict:
    """Returns the content of store.json: settings that select documents, and units of reading."""
    surveys = {source.name: sources.survey(source, data) for source in data.named_sources()}
    units = {name: [unit._asdict() for unit in found] for name, (found, _) in surveys.items()}
    left_out = {name: sentences for name, (_, sentences) in surveys.items()}
    return {"format": FORMAT, "data": _settings(data), "units": units, "left_out": left_out}


def _settings(data: DataConfig) -> dict:
    """Returns the settings that select documents and decide how they are sharded."""
    settings = {
        name: value
        for name, value in dataclasses.asdict(data).items()
        if name not in ("root", "sources", "records", "workers")
    }
    settings["sources"] = [dataclasses.asdict(source) for source in data.named_sources()]
    for source in settings["sources"]:
        del source["weight"]
    return json.loads(json.dumps(settings))


def _read_store(directory: Path, data: DataConfig | None) -> dict:
    stored = load(directory / STORE)
    if stored.get("format") != FORMAT:
        raise ValueError(
            f"{directory / STORE} has format {stored.get('format')}, this program reads {FORMAT}: "
            "make the records anew in another directory"
        )
    changed = data and differences(stored["data"], _settings(data), "data", skipped=())
    if changed:
        raise ValueError(
            f"the records in {str(directory)!r} were made with other settings: {changed[0]}; use "
            "those, or make records in another directory"
        )
    return stored


def _index(directory: Path, tasks: Iterable[tuple[SourceConfig, Unit]]) -> dict:
    """Returns the content of index.json."""
    shards, bad = [], {}
    for source, unit in tasks:
        count, first = bad.setdefault(source.name, (0, []))
        for mark in map(load, writing.marks(directory, source, unit)):
            shards += mark["shards"]
            count, first = count + mark["bad"], (first + mark["first_bad"])[:NAMED_BAD]
        bad[source.name] = (count, first)
    return {"shards": shards, "bad": bad}


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
    lock = _lock(path.parent, path.name)
    share([path], Path.exists, lambda path: write_json(path, make()), lambda _: lock)


def _lock(directory: Path, name: str) -> Path:
    return directory / ".locks" / f"{name}.lock"


def _local(directory: str | os.PathLike) -> Path:
    """Returns the directory; ValueError for a bucket, where ArrayRecord cannot open files."""
    if re.match(r"[a-z][a-z0-9]+:/", os.fspath(directory)):
        raise ValueError(
            f"records in {str(directory)!r}: they must be local files; mount the bucket (gcsfuse) "
            "or use a local disk"
        )
    return Path(os.path.expanduser(directory))
