"""Cuts sources into units, and reads the documents of a unit.

A unit is a part of a source that a process can read by itself, and that gives the same documents in
the same order each time. Files are ordered by a hash of the seed and their names, so that the first
of them are a random sample.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from etils import epath

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data import conversations
from bltjax.data.sources import readers, synthetic, tables
from bltjax.data.sources.files import COMPLETE, File, Listing, find_files, relative_names
from bltjax.data.sources.left_out import LeftOut, described
from bltjax.data.sources.readers import Bad, Document, Fields, undecoded
from bltjax.runtime.terminal import printable

_WHOLE = ("text", "bytes")  # kinds of files that are one document
_TRIED = 10_000  # records that are read to see whether a source has a document
_REASONS = 10  # that are told
_FILES = 20  # that are named for a reason
_FOOTERS = 256  # files whose structure is read in parallel, since remote files are slow


class Unit(NamedTuple):
    """A part of a source, in plain data.

    start and stop count bytes (jsonl), row groups (parquet), record batches (arrow) or records
    (array_record), and a stop of -1 is the end of the file; for huggingface they are the shard and
    the number of shards, for synthetic numbers of documents.
    """

    name: str  # unique in its source, fit for a file name; names sort in reading order
    kind: str  # kind of its files
    paths: tuple[str, ...]  # its files, several only for text; of huggingface the dataset
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

    Left out are hidden files and directories, directories named in `data.exclude` and, in
    directories, files of other endings. Linked directories are not entered; a linked file counts if
    it leads to a file below the root that is not listed otherwise. Only regular files are read.
    Raises FileNotFoundError where there is nothing at the path, ValueError where no file is of the
    kind, a library is missing or a preprocessed file is unfinished, OSError where a directory
    cannot be listed.
    """
    return _list_units(source, data)[0]


def survey(source: SourceConfig, data: DataConfig) -> tuple[list[Unit], list[str]]:
    """Returns `list_units`, and sentences on the files at the source's path that are left out."""
    units, left_out = _list_units(source, data)
    return units, described(left_out, source, data)


def _list_units(source: SourceConfig, data: DataConfig) -> tuple[list[Unit], list[LeftOut]]:
    left_out = []
    if source.kind == "huggingface":
        units = _dataset_units(source, data)
    elif source.kind == "synthetic":
        units = _synthetic_units(data)
    else:
        files, left_out = list_files(source, data)
        # Not the hash of the split, by which the first files would all be validation documents.
        files.sort(key=lambda file: (_hash(f"order:{data.seed}:{file.name}"), file.name))
        target = min(data.shard_bytes, data.max_bytes or data.shard_bytes)
        units = _about(_cut(files, target), data.max_bytes)
    width = max(5, len(str(len(units) - 1)))
    return [unit._replace(name=f"{i:0{width}d}") for i, unit in enumerate(units)], left_out


def list_files(source: SourceConfig, data: DataConfig, lenient: bool = False) -> Listing:
    """Returns the files of a source; see `list_units`, and `find_files` for `lenient`."""
    listing = find_files(source, data, lenient)
    _refuse_unfinished(listing.files)
    return listing


def read_unit(unit: Unit, source: SourceConfig, data: DataConfig) -> Iterator[Document | Bad]:
    """Yields the documents of a unit in order, with a Bad for each record that is none.

    Raises OSError that names the file where one is gone or the disk fails.
    """
    if unit.kind == "huggingface":
        yield from _read_shard(unit, source, data, fields_of(source, data))
        return
    if unit.kind == "synthetic":
        language = synthetic.language(f"{data.seed}:{source.name}")
        for number in range(unit.start, unit.stop):
            yield Document(f"synthetic:{number}", synthetic.document(language, number))
        return
    for path, name in zip(unit.paths, relative_names(unit.paths, source), strict=True):
        file = File(name, path, unit.kind, 0)
        yield from read_file(file, source, data, unit.start, unit.stop)


def read_file(
    file: File,
    source: SourceConfig,
    data: DataConfig,
    start: int = 0,
    stop: int = -1,
    limit: int | None = None,
) -> Iterator[Document | Bad]:
    """Yields the documents of a file, or of a part of it; see `Unit` for start and stop.

    This is the one reader of all commands. limit: no more bytes of a file that is one text are
    read.
    """
    (name, path, kind, _), fields = file, fields_of(source, data)
    try:
        if kind == "text":
            yield from readers.read_text(path, name, limit)
        elif kind == "bytes":
            yield from readers.read_bytes(path, name, limit)
        elif kind == "array_record":
            records = fields if source.field else None
            yield from readers.read_array_record(path, name, start, stop, records)
        else:
            read = {
                "jsonl": readers.read_jsonl,
                "parquet": tables.read_parquet,
                "arrow": tables.read_arrow,
            }[kind]
            yield from read(path, name, start, stop, fields)
    except OSError as error:
        raise _named(error, path) from error


def fields_of(source: SourceConfig, data: DataConfig) -> Fields:
    """Returns the fields of a source's records that are read."""
    if source.kind == "chat":
        return Fields(conversations.FIELDS, data.id_fields, data.language_fields, data.chat)
    text = (source.field,) if source.field else data.text_fields
    return Fields(text, data.id_fields, data.language_fields)


def refuse_without_document(units: Iterable[Unit], source: SourceConfig, data: DataConfig):
    """Raises ValueError where the first records of a source, _TRIED at most, are all bad."""
    records = (found for unit in units for found in read_unit(unit, source, data))
    tried = []
    for found in itertools.islice(records, _TRIED):
        if isinstance(found, Document):
            return
        tried.append(found)
    if tried:
        raise ValueError(no_document(tried, f"source {source.name!r}"))


def no_document(bad: Sequence[Bad], where: str) -> str:
    """Returns the error for records of which none is a document: reasons, counted, and a remedy."""
    remedy = "name another path"
    if any("field" in record.reason for record in bad):
        remedy += ", or the field of the text (config.data.text_fields, field of a source, --field)"
    return (
        f"none of the {len(bad)} records that were read of {where} is a document: "
        f"{'; '.join(grouped(bad))}; {remedy}"
    )


def grouped(bad: Iterable[Bad]) -> list[str]:
    """Returns a sentence for each reason: the first record that has it, how many do, and where."""
    by_reason: dict[str, list[Bad]] = {}
    for record in bad:
        by_reason.setdefault(record.reason, []).append(record)
    sentences = [
        printable(f"{same[0].name}: {' '.join(reason.split())}")
        + (f" ({len(same)} times{printable(_other_files(same))})" if len(same) > 1 else "")
        for reason, same in itertools.islice(by_reason.items(), _REASONS)
    ]
    more = len(by_reason) - _REASONS
    return [*sentences, f"and {more} more reasons"] if more > 0 else sentences


def _other_files(same: Sequence[Bad]) -> str:
    """Returns the names of files of records but the first one's."""
    place = re.compile(r":\w* ?[\d.]+$")
    _, *others = dict.fromkeys(place.sub("", record.name) for record in same)
    more = f" and {len(others) - _FILES} more" if len(others) > _FILES else ""
    return f", also in {', '.join(others[:_FILES])}{more}" if others else ""


def _named(error: OSError, path: str) -> OSError:
    """Returns an error of a file that names it and the remedy."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(
            f"{path} is gone since the files were listed: put it back, or begin anew without it"
        )
    if error.errno is None:
        return error
    return OSError(f"{path} cannot be read: {error.strerror}")


def _cut(files: Sequence[File], target: int) -> Iterator[Unit]:
    """Yields units of about `target` bytes, in the order of the files."""
    texts, size, kind = [], 0, ""
    with ThreadPoolExecutor(16) as pool:
        for first in range(0, len(files), _FOOTERS):
            several = files[first : first + _FOOTERS]
            others = [file for file in several if file.kind not in _WHOLE]
            parts = pool.map(lambda file: list(_parts(file, target)), others)
            for file in several:
                if file.kind not in _WHOLE:
                    spans = next(parts)
                    yield from (Unit("", file.kind, (file.path,), *span) for span in spans)
                    continue
                if texts and size + file.size > target:
                    yield Unit("", kind, tuple(texts), 0, -1, size)
                    texts, size = [], 0
                kind = file.kind  # one for all: a source has texts or raw bytes
                texts.append(file.path)
                size += file.size
    if texts:
        yield Unit("", kind, tuple(texts), 0, -1, size)


def _parts(file: File, target: int) -> Iterable[tuple[int, int, int]]:
    """Returns (start, stop, bytes on disk) of the parts of a file; a damaged file is one part."""
    try:
        if file.kind == "parquet":
            groups = tables.parquet_groups(file.path)
            return _even(1, file.size, target) if groups is None else _grouped(groups, target)
        return _even(_count(file), file.size, target)
    except OSError as error:
        raise _named(error, file.path) from error


def _count(file: File) -> int:
    """Returns the number of records or bytes at which a file may be cut; 1 where it may not."""
    if file.kind == "arrow":
        return (tables.arrow_layout(file.path) or (1, False))[0]
    if file.kind == "array_record":
        return readers.array_records(file.path) or 1
    return file.size if readers.can_be_cut(file.path, file.name) else 1


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


def _synthetic_units(data: DataConfig) -> list[Unit]:
    mean, total = synthetic.MEAN_BYTES, data.max_bytes or synthetic.DEFAULT_BYTES
    target = min(data.shard_bytes, total)
    documents, of_unit = (max(1, round(size / mean)) for size in (total, target))
    spans = ((start, min(start + of_unit, documents)) for start in range(0, documents, of_unit))
    return [Unit("", "synthetic", (), *span, mean * (span[1] - span[0])) for span in spans]


def _hash(text: str) -> float:
    """Returns a number in [0, 1) that is the same for the same text on every machine."""
    digest = hashlib.blake2b(undecoded(text), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
