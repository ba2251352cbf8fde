"""Cuts sources into units, and reads the documents of a unit.

A unit is a part of a source that a process can read by itself, and that gives the same documents in
the same order each time. Files are ordered by a hash of the seed and their names, so that the first
of them are a random sample.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from etils import epath

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.sources import readers, tables
from bltjax.data.sources.files import COMPLETE, File, find_files, relative_names
from bltjax.data.sources.readers import Bad, Document, Fields

_FOOTERS = 256  # files whose structure is read in parallel, since remote files are slow


class Unit(NamedTuple):
    """A part of a source, in plain data.

    start and stop count bytes (jsonl), row groups (parquet), record batches (arrow) or records
    (array_record), and a stop of -1 is the end of the file; for huggingface they are the shard and
    the number of shards.
    """

    name: str  # unique in its source, fit for a file name; names sort in reading order
    kind: str  # kind of its files
    paths: tuple[str, ...]  # its files, several only for text; for huggingface the dataset
    start: int
    stop: int
    size: int  # bytes on disk, about; 0 where unknown


def is_held_out(name: str, validation_fraction: float, seed: int) -> bool:
    """Returns True for a document of the validation set.

    The answer depends on the arguments alone, and a larger fraction only adds documents.
    """
    return _hash(f"{seed}:{name}") < validation_fraction


def list_units(source: SourceConfig, data: DataConfig) -> list[Unit]:
    """Returns the units of a source, of about `data.shard_bytes` each and `data.max_bytes` in all.

    Hidden files, hidden directories and those named in `data.exclude` are left out. Linked
    directories are not entered; a linked file counts if it leads to a file below the root that is
    not listed otherwise. Raises FileNotFoundError where there is nothing at the path, ValueError
    where no file is of the kind, a library is missing or a preprocessed file is unfinished, OSError
    where a directory cannot be listed.
    """
    if source.kind == "huggingface":
        units = _dataset_units(source, data)
    else:
        files = find_files(source, data)
        _refuse_unfinished(files)
        # Not the hash of the split, by which the first files would all be validation documents.
        files.sort(key=lambda file: (_hash(f"order:{data.seed}:{file.name}"), file.name))
        target = min(data.shard_bytes, data.max_bytes or data.shard_bytes)
        units = _about(_cut(files, target), data.max_bytes)
    width = max(5, len(str(len(units) - 1)))
    return [unit._replace(name=f"{i:0{width}d}") for i, unit in enumerate(units)]


def read_unit(unit: Unit, source: SourceConfig, data: DataConfig) -> Iterator[Document | Bad]:
    """Yields the documents of a unit in order, with a Bad for each record that is none."""
    text = (source.field,) if source.field else data.text_fields
    fields = Fields(text, data.id_fields, data.language_fields)
    if unit.kind == "huggingface":
        yield from _read_shard(unit, source, data, fields)
        return
    files = zip(unit.paths, relative_names(unit.paths, source), strict=True)
    if unit.kind == "text":
        yield from (readers.read_text(path, name) for path, name in files)
        return
    read = {
        "jsonl": readers.read_jsonl,
        "parquet": tables.read_parquet,
        "arrow": tables.read_arrow,
        "array_record": readers.read_array_record,
    }[unit.kind]
    if unit.kind == "array_record" and not source.field:
        fields = None
    yield from read(*next(files), unit.start, unit.stop, fields)


def _cut(files: Sequence[File], target: int) -> Iterator[Unit]:
    """Yields units of about `target` bytes, in the order of the files."""
    texts, size = [], 0
    with ThreadPoolExecutor(16) as pool:
        for first in range(0, len(files), _FOOTERS):
            several = files[first : first + _FOOTERS]
            others = [file for file in several if file.kind != "text"]
            parts = pool.map(lambda file: _parts(file, target), others)
            for file in several:
                if file.kind != "text":
                    spans = next(parts)
                    yield from (Unit("", file.kind, (file.path,), *span) for span in spans)
                    continue
                if texts and size + file.size > target:
                    yield Unit("", "text", tuple(texts), 0, -1, size)
                    texts, size = [], 0
                texts.append(file.path)
                size += file.size
    if texts:
        yield Unit("", "text", tuple(texts), 0, -1, size)


def _parts(file: File, target: int) -> Iterable[tuple[int, int, int]]:
    """Returns (start, stop, bytes on disk) of the parts of a file; a damaged file is one part."""
    count = 1
    if file.kind == "parquet":
        groups = tables.parquet_groups(file.path)
        if groups is not None:
            return _grouped(groups, target)
    elif file.kind == "arrow":
        count = (tables.arrow_layout(file.path) or (1, False))[0]
    elif file.kind == "array_record":
        count = readers.array_records(file.path) or 1
    elif file.path.endswith(".zst"):
        readers.need("zstandard", "data")
    elif not file.path.endswith(readers.COMPRESSED):
        count = file.size
    return _even(count, file.size, target)


def _even(count: int, size: int, target: int) -> Iterable[tuple[int, int, int]]:
    """Cuts a file of `count` records or bytes, which take up `size` bytes, into equal parts."""
    pieces = max(1, min(count, round(size / target)))
    if pieces == 1:
        return [(0, -1, size)]
    edges = (count * i // pieces for i in range(pieces + 1))
    return (
        (start, stop, size * (stop - start) // count) for start, stop in itertools.pairwise(edges)
    )


def _grouped(groups: list[tuple[int, int]], target: int) -> Iterator[tuple[int, int, int]]:
    """Joins consecutive row groups, each (bytes in memory, bytes on disk), into parts."""
    start = memory = disk = 0
    for i, (more_memory, more_disk) in enumerate(groups):
        if i > start and memory + more_memory > target:
            yield start, i, disk
            start, memory, disk = i, 0, 0
        memory, disk = memory + more_memory, disk + more_disk
    yield start, len(groups), disk


def _about(units: Iterable[Unit], max_bytes: int | None) -> list[Unit]:
    """Returns the first units, at least one, whose sizes together come nearest to `max_bytes`."""
    taken, total = [], 0
    for unit in units:
        if max_bytes is not None and taken and unit.size >= 2 * (max_bytes - total):
            break
        taken.append(unit)
        total += unit.size
    return taken


def _refuse_unfinished(files: Iterable[File]) -> None:
    """Raises for a preprocessed file without marker beside files that have one (model.md#files)."""
    paths = sorted(file.path for file in files if file.kind == "arrow")
    for directory, inside in itertools.groupby(paths, lambda path: path.rpartition("/")[0]):
        names = {path.name for path in epath.Path(directory).iterdir()}
        if not any(name.endswith(COMPLETE) for name in names):
            continue
        for path in inside:
            is_marked = path.rpartition("/")[2] + COMPLETE in names
            if not is_marked and (tables.arrow_layout(path) or (0, True))[1]:
                raise ValueError(
                    f"{path} has no marker {path}{COMPLETE} though files beside it have theirs: its"
                    " preprocessing did not end; finish it, or delete the file"
                )


def _dataset_units(source: SourceConfig, data: DataConfig) -> list[Unit]:
    shards = readers.open_dataset(source.path, source.subset, source.split).num_shards
    order = sorted(range(shards), key=lambda shard: _hash(f"order:{data.seed}:{shard}"))
    taken = order[: _shards_taken(shards, data)]
    return [Unit("", "huggingface", (source.path,), shard, shards, 0) for shard in taken]


def _shards_taken(shards: int, data: DataConfig) -> int:
    """Returns the number of shards to read for `max_bytes`; their sizes are not known."""
    if data.max_bytes is None:
        return shards
    return min(shards, max(1, data.max_bytes // data.shard_bytes))


def _read_shard(unit: Unit, source: SourceConfig, data: DataConfig, fields: Fields):
    dataset = readers.open_dataset(source.path, source.subset, source.split)
    share, size = math.inf, 0
    if data.max_bytes is not None:
        share = data.max_bytes // _shards_taken(dataset.num_shards, data)
    for found in readers.read_dataset(dataset, source.split, unit.start, fields):
        yield found
        size += len(found.data) if isinstance(found, Document) else 0
        if size >= share:
            return


def _hash(text: str) -> float:
    """Returns a number in [0, 1) that is the same for the same text on every machine."""
    try:
        # POSIX file names may hold bytes that are not UTF-8,
        encoded = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # and ids of JSON records other surrogates.
        encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=6).digest(), "big") / 2**48
