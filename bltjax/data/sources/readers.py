"""Reads documents from parts of files: text, JSON lines, ArrayRecord, Hugging Face datasets.

A reader yields documents in the order of the file, a `Bad` for each record that is no document, and
one Bad where a damaged file cannot be read on. A document without an id is named by its place in
the whole file, so names do not depend on how a file was cut into parts.
"""

import functools
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

COMPRESSED = (".gz", ".zst")  # endings of JSON lines files that can be read from the start only
_CHUNK = 1 << 16


class Document(NamedTuple):
    """A text, as a source holds it."""

    name: str  # stable id
    data: bytes
    language: str = ""  # empty where unknown
    entropies: np.ndarray | None = None  # float16 [len(data) + 2], nats; few sources have them


class Bad(NamedTuple):
    """A record that is no document."""

    name: str  # place of the record, such as "web/1.jsonl.gz:line 17"
    reason: str


class Fields(NamedTuple):
    """Names of the fields that may hold a record's text, id and language; the first one counts."""

    text: tuple[str, ...]
    id: tuple[str, ...] = ()
    language: tuple[str, ...] = ()


def in_chunks(items: Iterable, size: Callable, chunk_size: int) -> Iterator[list]:
    """Yields consecutive items in lists whose sizes sum to `chunk_size` or just over it.

    size: tells the size of an item. The last list may be smaller.
    """
    chunk, total = [], 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if total >= chunk_size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def need(module: str, extra: str):
    """Imports an optional library; raises ValueError with the remedy where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ValueError(
            f"{library} is needed and missing ({error}): pip install 'bltjax[{extra}]'"
        ) from error


def open_file(path: str) -> BinaryIO:
    """Opens a local or remote file (gs://, s3://) for reading bytes."""
    return epath.Path(path).open("rb") if "://" in path else open(path, "rb")


def read_text(path: str, file: str) -> Document:
    """Reads a whole file as one document, without decoding it."""
    with open_file(path) as opened:
        return Document(file, opened.read())


def read_jsonl(
    path: str, file: str, start: int, stop: int, fields: Fields
) -> Iterator[Document | Bad]:
    """Yields the records of lines that begin in bytes [start, stop) of a file; -1: to its end.

    A compressed file (.gz, .zst) is always read whole, and its records are named by line numbers.
    """
    compressed = path.endswith(COMPRESSED)
    place = f"{file}:line" if compressed else f"{file}:byte"
    number = 0
    with open_file(path) as raw:
        lines = _decompressed(raw, path) if compressed else _lines(raw, start, stop)
        try:
            for number, line in lines:
                if not line.isspace():
                    yield _parsed(line, fields, place, number)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            reason = f"the compressed file is cut off or damaged from here on: {error}"
            yield Bad(f"{place} {number + 1}", reason)


def _lines(raw: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yields (position of the first byte, line) for lines that begin in [start, stop)."""
    position = start
    if start:
        # A line begins at `start` if the byte before ends one. Skips in chunks, since a line may be
        # longer than memory.
        position -= 1
        raw.seek(position)
        skipped = b" "
        while skipped and not skipped.endswith(b"\n") and not 0 <= stop <= position:
            skipped = raw.readline(_CHUNK)
            position += len(skipped)
    while stop < 0 or position < stop:
        line = raw.readline()
        if not line:
            return
        yield position, line
        position += len(line)


def _decompressed(raw: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) for all members or frames of a compressed file."""
    if not raw.read(1):
        raise EOFError("it is empty")
    raw.seek(0)
    if path.endswith(".gz"):
        opened = gzip.GzipFile(fileobj=raw)
    else:
        opened = io.BufferedReader(_Blocks(_zstd_blocks(raw)), _CHUNK)
    yield from enumerate(opened, 1)


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    """Decompresses consecutive frames. Unlike zstandard's own reader it notices a cut-off file."""
    zstandard = need("zstandard", "data")
    # Frames made with --long ask for windows of up to 2 GB.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, compressed = None, b""
    while compressed := compressed or raw.read(_CHUNK):
        frame = frame or decompressor.decompressobj()
        try:
            yield frame.decompress(compressed)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        compressed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("it ends inside a zstd frame")


class _Blocks(io.RawIOBase):
    """A file of the content of consecutive blocks."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.left = filter(None, blocks), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.left = self.left or memoryview(next(self.blocks, b""))
        count = min(len(buffer), len(self.left))
        buffer[:count] = self.left[:count]
        self.left = self.left[count:]
        return count


def _parsed(line: bytes, fields: Fields, place: str, number: int) -> Document | Bad:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Bad(f"{place} {number}", "not UTF-8")
    except (ValueError, RecursionError) as error:
        # Without the position of the error, so that reasons can be counted.
        return Bad(f"{place} {number}", f"not JSON: {getattr(error, 'msg', error)}")
    return document(record, fields, place, number)


def document(record, fields: Fields, place: str, number) -> Document | Bad:
    """Makes a document of a record, a dict of fields; place and number: "web/1.jsonl:line", 17."""
    where = f"{place} {number}"
    if not isinstance(record, dict):
        return Bad(where, f"a {type(record).__name__} in the place of an object with fields")
    field = next((name for name in fields.text if name in record), None)
    if field is None:
        return Bad(where, f"no field {' or '.join(map(repr, fields.text))}")
    text = record[field]
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")
    if not isinstance(text, bytes):
        return Bad(where, f"field {field!r} holds a {type(text).__name__} instead of a string")
    ids = (record.get(name) for name in fields.id)
    name = next((str(i) for i in ids if isinstance(i, (str, int)) and i != ""), None)
    if name is None:
        name = f"{place.rpartition(':')[0]}:{number}"
    language = next((record[name] for name in fields.language if name in record), "")
    return Document(name, text, language if isinstance(language, str) else "")


def end_of(stop: int) -> int | None:
    """Returns the end of a slice for a `stop` whose -1 means the end of the file."""
    return None if stop < 0 else stop


def array_records(path: str) -> int | None:
    """Counts the records; None for a damaged file. Raises ValueError for a remote one."""
    if "://" in path:
        raise ValueError(
            f"{path}: array_record files are read from local disks only; copy it, or mount the "
            "bucket (gcsfuse)"
        )
    if not os.path.exists(path):
        raise FileNotFoundError(f"no file {path!r}")
    reader = ArrayRecordReader(path)
    return reader.num_records() if reader.ok() else None


def read_array_record(
    path: str, file: str, start: int, stop: int, fields: Fields | None
) -> Iterator[Document | Bad]:
    """Yields records [start, stop), where -1 is the end of the file.

    Records are JSON objects with `fields`, or plain bytes without.
    """
    count = array_records(path)
    if count is None:
        yield Bad(file, "the file is cut off or damaged: it has no sound index")
        return
    reader = ArrayRecordReader(path)
    reader.seek(start)
    for number in range(count)[start : end_of(stop)]:
        try:
            record = reader.read()
        except RuntimeError as error:
            yield Bad(f"{file}:record {number}", f"the file is damaged from here on: {error}")
            return
        if fields is None:
            yield Document(f"{file}:{number}", record)
        else:
            yield _parsed(record, fields, f"{file}:record", number)


@functools.lru_cache(maxsize=4)
def open_dataset(path: str, subset: str, split: str):
    """Opens a Hugging Face dataset for streaming; it has `num_shards` and `shard()`."""
    datasets = need("datasets", "hf")
    try:
        given = os.path.expanduser(path), subset or None
        return datasets.load_dataset(*given, split=split, streaming=True)
    except RuntimeError as error:  # of a dataset that is a script
        raise ValueError(f"the dataset {path!r} cannot be read: {error}; choose another") from error


def read_dataset(dataset, name: str, shard: int, fields: Fields) -> Iterator[Document | Bad]:
    """Yields the records of one shard of a dataset; without an id: `name:shard.record`."""
    broken = need("datasets", "hf").exceptions.DatasetGenerationError
    try:
        for i, record in enumerate(dataset.shard(dataset.num_shards, shard)):
            yield document(record, fields, f"{name}:record", f"{shard}.{i}")
    except (ValueError, broken) as error:  # nothing behind a record that cannot be parsed is known
        yield Bad(f"{name}:shard {shard}", f"it cannot be read to its end: {error}")
