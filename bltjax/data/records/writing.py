"""Writes a unit of a source as shards, chunk by chunk.

A chunk is the next documents of the unit, of about `shard_bytes` together, and makes one shard of
each part. Its mark, a small JSON file, is written once its shards are complete. A process may be
killed at any moment: the next one reads the unit again, skips the documents of complete chunks and
writes the rest, and the files are the same, byte for byte.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.records.shards import Shard, damaged, encoded, replacing_records, write_entropies
from bltjax.data.sources import units
from bltjax.data.sources.units import Bad, Document, Unit
from bltjax.runtime.files import write_json

PARTS = ("train", "validation")
NAMED_BAD = 20  # bad records that are listed; the others are only counted


def record_unit(
    directory: Path, source: SourceConfig, unit: Unit, data: DataConfig
) -> Iterator[int]:
    """Writes the chunks of a unit that are not there yet, one at each step of the iterator.

    Yields the bytes of the unit's documents up to the end of each chunk. Raises ValueError where
    the source has changed, and for a bad record under bad_records="fail".
    """
    records = units.read_unit(unit, source, data)
    num_read = unit_bytes = 0
    for chunk in itertools.count():
        mark = _mark(directory, source, unit, chunk)
        if mark.exists():
            content = load(mark)
            count = content["records"] - num_read  # passed over, unless they are the last
            if not content["last"] and sum(1 for _ in itertools.islice(records, count)) < count:
                raise ValueError(
                    f"{unit.name} has fewer records than when {str(directory)!r} was begun: delete "
                    "that directory and make the records anew"
                )
        else:
            content = _write_chunk(directory, source, mark.stem, records, data)
            content["records"] += num_read
            write_json(mark, content)
        num_read = content["records"]
        unit_bytes += sum(shard["num_bytes"] for shard in content["shards"])
        yield unit_bytes
        if content["last"]:
            return


def is_whole(directory: Path, source: SourceConfig, unit: Unit) -> bool:
    whole = list(marks(directory, source, unit))
    return bool(whole) and load(whole[-1])["last"]


def marks(directory: Path, source: SourceConfig, unit: Unit) -> Iterator[Path]:
    """Yields the marks of a unit's complete chunks."""
    paths = (_mark(directory, source, unit, chunk) for chunk in itertools.count())
    return itertools.takewhile(Path.exists, paths)


class _OpenShard(NamedTuple):
    writer: ArrayRecordWriter
    languages: dict[str, list[int]]
    entropies: list[np.ndarray | None]


def _write_chunk(
    directory: Path,
    source: SourceConfig,
    name: str,
    records: Iterator[Document | Bad],
    data: DataConfig,
) -> dict:
    """Writes the next `shard_bytes` of documents and returns the content of the chunk's mark."""
    parts: dict[str, _OpenShard] = {}
    bad: list[Bad] = []
    num_read = num_bad = num_bytes = 0
    with contextlib.ExitStack() as stack:
        while num_bytes < data.shard_bytes and (record := next(records, None)) is not None:
            num_read += 1
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
            if part not in parts:
                path = directory / source.name / part / f"{name}.array_record"
                parts[part] = _OpenShard(stack.enter_context(replacing_records(path)), {}, [])
            parts[part].writer.write(encoded(record))
            parts[part].entropies.append(record.entropies)
            counts = parts[part].languages.setdefault(record.language, [0, 0])
            counts[0] += 1
            counts[1] += len(record.data)
            num_bytes += len(record.data)
    shards = []
    for part, opened in parts.items():
        stem = f"{source.name}/{part}/{name}"
        size = (directory / f"{stem}.array_record").stat().st_size
        counts = (sum(column) for column in zip(*opened.languages.values(), strict=True))
        shard = Shard(stem, source.name, part, *counts, size, opened.languages)
        if all(row is not None for row in opened.entropies):
            write_entropies(below(directory, shard._asdict()), opened.entropies)
        shards.append(shard._asdict())
    last = num_bytes < data.shard_bytes
    return {"records": num_read, "last": last, "shards": shards, "bad": num_bad, "first_bad": bad}


def _mark(directory: Path, source: SourceConfig, unit: Unit, chunk: int) -> Path:
    return directory / source.name / f"{unit.name}-{chunk:04}.json"


def below(directory: Path, shard: dict) -> Shard:
    return Shard(**{**shard, "stem": str(directory / shard["stem"])})


def load(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise damaged(path, str(error)) from error
