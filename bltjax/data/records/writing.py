"""Writes a unit of a source as shards, chunk by chunk.

A chunk is the next documents of the unit, of about `shard_bytes` together, and makes one shard of
each part. Its mark, a small JSON file, is written once its shards are complete. A process may be
killed at any moment: the next one reads the unit again, passes over the documents of complete
chunks and writes the rest, and the files are the same, byte for byte. A chunk whose mark or whose
shard is missing is written anew, without entropies.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.records import source_files
from bltjax.data.records.shards import (
    RecordWriter,
    Shard,
    damaged,
    drop,
    encoded,
    has_entropies,
    replacing_records,
    size_of,
    write_entropies,
)
from bltjax.data.sources import units
from bltjax.data.sources.units import Bad, Document, Unit
from bltjax.runtime import buckets, object_cache
from bltjax.runtime.checked_json import read_checked, write_checked
from bltjax.runtime.files import share
from bltjax.runtime.paths import is_remote
from bltjax.runtime.system_errors import reading

PARTS = ("train", "validation")
NAMED_BAD = 20  # bad records that are listed; the others are only counted
MARK = dict(records=int, last=bool, shards=list, bad=int, first_bad=list)  # what it must have


class Task(NamedTuple):
    """A unit to record."""

    source: SourceConfig
    unit: Unit
    key: str  # of the settings and the unit, which its marks repeat; "" in version 0.1
    states: list  # of its files, see `source_files`

    @property
    def name(self) -> str:
        return f"{self.source.name}/{self.unit.name}"


def record_units(
    directory: Path,
    tasks: Sequence[Task],
    data: DataConfig,
    on_progress: Callable[[Task, int], None] | None = None,
):
    """Records units that are not whole yet; several processes may do so at once (`files.share`).

    on_progress: called with a unit and how many of its bytes are recorded. Raises as `record_unit`
    does.
    """

    def record(task: Task):
        for unit_bytes in record_unit(directory, task, data):
            if on_progress:
                on_progress(task, unit_bytes)

    share(
        tasks,
        is_done=lambda task: is_whole(chunks(directory, task)),
        do=record,
        lock=lambda task: lock_of(directory, task.name),
    )


def lock_of(directory: Path, name: str) -> Path:
    """Returns the lock file of something in a store, for `files.share`."""
    return directory / ".locks" / f"{name}.lock"


def record_unit(directory: Path, task: Task, data: DataConfig) -> Iterator[int]:
    """Writes the chunks of a unit that are not there yet, one at each step of the iterator.

    Yields the bytes of the unit's documents up to the end of each chunk. Raises ValueError where
    the source has changed, and for a bad record under bad_records="fail".
    """
    records = units.read_unit(task.unit, task.source, data)
    num_read = unit_bytes = 0
    made = []
    for chunk in itertools.count():
        mark = _mark(directory, task, chunk)
        content = _content(directory, task, mark)
        if content is None:
            content = _write_chunk(directory, task, mark.stem, records, data)
            content["records"] += num_read
            source_files.refuse_changed(directory, task, source_files.states(task.unit))
            write_checked(mark, content)
            made.append(mark)
        elif not _is_next(records, content, num_read):
            for path in made:  # They were read from the other text.
                drop(path)
            raise source_files.changed(directory, task, task.unit.paths)
        num_read = content["records"]
        unit_bytes += sum(shard["num_bytes"] for shard in content["shards"])
        yield unit_bytes
        if content["last"]:
            return


def check_unit(directory: Path, task: Task, data: DataConfig, paths: list[str]):
    """Raises ValueError, that blames `paths`, where a unit does not give what is recorded of it."""
    records = units.read_unit(task.unit, task.source, data)
    num_read = 0
    for content in chunks(directory, task):
        if not _is_next(records, content, num_read):
            raise source_files.changed(directory, task, paths)
        num_read = content["records"]


def is_whole(found: Iterable[dict]) -> bool:
    """Tells whether the chunks of a unit go to its end."""
    return any(content["last"] for content in found)


def chunks_of_all(directory: Path, tasks: Sequence[Task]) -> Iterator[list[dict]]:
    """Yields the `chunks` of each unit; a bucket is listed once and its marks are read together."""
    if not is_remote(directory):
        yield from (list(chunks(directory, task)) for task in tasks)
        return
    object_cache.learn(directory)

    def read(task: Task) -> list[dict]:
        is_begun = object_cache.is_known(_mark(directory, task, 0))
        return list(chunks(directory, task)) if is_begun else []

    with ThreadPoolExecutor(buckets.MOST_AT_ONCE) as pool:
        yield from pool.map(read, tasks)


def chunks(directory: Path, task: Task) -> Iterator[dict]:
    """Yields what the marks of a unit's complete chunks hold, up to the first that is missing."""
    for chunk in itertools.count():
        content = _content(directory, task, _mark(directory, task, chunk))
        if content is None:
            return
        yield content
        if content["last"]:
            return


def _content(directory: Path, task: Task, mark: Path) -> dict | None:
    """Returns what a mark holds; None where the chunk is not there, or not whole any more."""
    try:
        content = load(mark)
    except OSError as error:  # one request of a bucket, not two
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    with intact(mark):
        for name, kind in MARK.items():
            if not isinstance(content[name], kind):
                raise TypeError(f"{name} is {content[name]!r}")
        shards = [below(directory, shard) for shard in content["shards"]]
    ours = content.get("unit", "") == task.key
    return content if ours and all(map(is_there, shards)) else None


class _OpenShard(NamedTuple):
    writer: RecordWriter
    languages: dict[str, list[int]]
    entropies: list[np.ndarray | None]
    digest: Any


def _write_chunk(
    directory: Path, task: Task, name: str, records: Iterator[Document | Bad], data: DataConfig
) -> dict:
    """Writes the next `shard_bytes` of documents and returns the content of the chunk's mark."""
    source, digest = task.source, _digest()
    parts: dict[str, _OpenShard] = {}
    bad: list[Bad] = []
    num_read = num_bad = num_bytes = 0
    _drop_chunk(directory, source, name)
    with contextlib.ExitStack() as stack:
        while num_bytes < data.shard_bytes and (record := next(records, None)) is not None:
            num_read += 1
            raw, fingerprint = _encoded(record)
            digest.update(fingerprint)
            if isinstance(record, Bad):
                if data.bad_records == "fail":
                    raise ValueError(
                        f"bad record {record.name!r} of source {source.name!r}: {record.reason}; "
                        f"mend it, or set bad_records='skip', and delete {str(directory)!r}"
                    )
                num_bad += 1
                bad += [record] * (len(bad) < NAMED_BAD)
                continue
            part = PARTS[units.is_held_out(record.name, data.validation_fraction, data.seed)]
            if part == "train" and len(record.data) > (data.max_document_bytes or math.inf):
                record = _beginning(record, data.max_document_bytes)
                raw, fingerprint = _encoded(record)
            if part not in parts:
                path = directory / source.name / part / f"{name}.array_record"
                writer = stack.enter_context(replacing_records(path))
                parts[part] = _OpenShard(writer, {}, [], _digest())
            parts[part].writer.write(raw)
            parts[part].entropies.append(record.entropies)
            parts[part].digest.update(fingerprint)
            counts = parts[part].languages.setdefault(record.language, [0, 0])
            counts[0] += 1
            counts[1] += len(record.data)
            num_bytes += len(record.data)
    shards = []
    for part, opened in parts.items():
        stem = f"{source.name}/{part}/{name}"
        size = size_of(directory / f"{stem}.array_record")
        counts = (sum(column) for column in zip(*opened.languages.values(), strict=True))
        given = all(row is not None for row in opened.entropies)
        about = opened.languages, opened.digest.hexdigest(), given
        shard = Shard(stem, source.name, part, *counts, size, *about)
        if given:
            write_entropies(below(directory, shard._asdict()), opened.entropies)
        shards.append(shard._asdict())
    last = num_bytes < data.shard_bytes
    about = dict(unit=task.key, content=digest.hexdigest())
    found = dict(records=num_read, last=last, shards=shards, bad=num_bad, first_bad=bad)
    return found | about


def _beginning(document: Document, num_bytes: int) -> Document:
    entropies = document.entropies
    if entropies is not None:  # its last one is of the end, which opens no patch
        entropies = entropies[: num_bytes + 2]
    return document._replace(data=document.data[:num_bytes], entropies=entropies)


def _drop_chunk(directory: Path, source: SourceConfig, name: str):
    """Deletes what is left of a chunk: its mark, and shards with entropies of the old documents."""
    below_source = directory / source.name
    left = [below_source / f"{name}.json"]
    for part in PARTS:
        shard = Shard(str(below_source / part / name), source.name, part, 0, 0, 0, {})
        left += [shard.entropies_path, shard.scores_path, shard.path]
    for path in left:
        drop(path)


def _is_next(records: Iterator[Document | Bad], content: dict, num_read: int) -> bool:
    """Passes over the records of a chunk; returns whether they are those that it was made of."""
    digest, count = _digest(), content["records"] - num_read
    for record in itertools.islice(records, count):
        digest.update(_encoded(record)[1])
        count -= 1
    return not count and content.get("content") in (None, digest.hexdigest())


def _encoded(record: Document | Bad) -> tuple[bytes, bytes]:
    """Returns the bytes that are stored of a record, and a fingerprint of all that is."""
    if isinstance(record, Bad):
        return b"", _digest(b"bad " + record.name.encode(errors="surrogatepass")).digest()
    raw = encoded(record)
    digest = _digest(raw)
    if record.entropies is not None:
        digest.update(np.asarray(record.entropies, "<f2").tobytes())
    return raw, digest.digest()


def _digest(content: bytes = b""):
    return hashlib.blake2b(content, digest_size=16)


def _mark(directory: Path, task: Task, chunk: int) -> Path:
    return directory / task.source.name / f"{task.unit.name}-{chunk:04}.json"


def below(directory: Path, shard: dict) -> Shard:
    return Shard(**{**shard, "stem": str(directory / shard["stem"])})


def is_there(shard: Shard) -> bool:
    """Returns whether a shard has its files, entropies included where they came with it."""
    there = size_of(shard.path) is not None
    return there and (not shard.with_entropies or has_entropies(shard))


def load(path: Path) -> dict:
    """Reads a JSON file of a store; ValueError with the remedy for a damaged one."""
    with intact(path), reading(path):
        return read_checked(path)


@contextlib.contextmanager
def intact(path: Path):
    """Raises the error of a damaged file where the block finds that its content cannot be."""
    try:
        yield
    except KeyError as error:
        raise damaged(path, f"no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged(path, str(error)) from error
