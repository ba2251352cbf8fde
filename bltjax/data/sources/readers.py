"""Reads documents from parts of files: text, JSON lines, ArrayRecord, Hugging Face datasets.

A reader yields documents in the order of the file, a `Bad` for each record that is no document, and
one Bad where a damaged file cannot be read on. A document without an id is named by its place in
the whole file, so names do not depend on how a file was cut into parts.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from bltjax.config.chat import ChatConfig
from bltjax.data import conversations
from bltjax.data.sources.compression import Unreadable, damage_of, open_content
from bltjax.data.sources.libraries import need

_CHUNK = 1 << 16
_SHOWN_FIELDS = 12  # of a record without text


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
    """Names of the fields that may hold a record's text, id and language; the first one counts.

    chat: of records that are conversations, in fields that are all named in `text`.
    """

    text: tuple[str, ...]
    id: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    chat: ChatConfig | None = None

    @property
    def every(self) -> tuple[str, ...]:
        """All these names."""
        return self.text + self.id + self.language


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


def open_file(path: str) -> BinaryIO:
    """Opens a local or remote file (gs://, s3://) for reading bytes."""
    return epath.Path(path).open("rb") if "://" in path else open(path, "rb")


def can_be_cut(path: str, file: str) -> bool:
    """Returns whether parts of a file of lines can be read by themselves: it is not compressed."""
    with open_file(path) as raw:
        try:
            return open_content(raw, file) is raw
        except Unreadable:
            return False


def read_bytes(path: str, file: str, limit: int | None = None) -> Iterator[Document]:
    """Yields a file's first `limit` bytes, or all of them, as they are."""
    with open_file(path) as raw:
        yield Document(file, raw.read(-1 if limit is None else limit))


def read_text(path: str, file: str, limit: int | None = None) -> Iterator[Document | Bad]:
    """Yields a whole file as one document, undecoded; see `text_of`."""
    with open_file(path) as raw:
        yield from text_of(raw, file, limit)


def text_of(raw: BinaryIO, file: str, limit: int | None = None) -> Iterator[Document | Bad]:
    """Yields the text of an opened file, decompressed if need be, or its first `limit` bytes.

    A file that is no text, such as an archive, is a Bad, and one that is damaged its beginning and
    a Bad.
    """
    try:
        content = open_content(raw, file)
    except Unreadable as error:
        yield Bad(file, str(error))
        return
    text = content.read(-1 if limit is None else limit)
    damage = damage_of(content)
    if text or not damage:
        yield Document(file, text)
    if damage:
        yield Bad(f"{file}:byte {len(text)}", damage)


def read_jsonl(
    path: str, file: str, start: int, stop: int, fields: Fields
) -> Iterator[Document | Bad]:
    """Yields the records of lines that begin in bytes [start, stop) of a file; -1: to its end.

    A compressed file is always read whole, and its records are named by line numbers.
    """
    with open_file(path) as raw:
        try:
            content = open_content(raw, file)
        except Unreadable as error:
            yield Bad(file, str(error))
            return
        compressed = content is not raw
        place, number = f"{file}:line" if compressed else f"{file}:byte", 0
        lines = enumerate(content, 1) if compressed else _lines(raw, start, stop)
        for number, line in lines:
            if line.isspace():
                continue
            found = _parsed(line, fields, place, number)
            if isinstance(found, Bad) and not line.endswith(b"\n") and damage_of(content):
                number -= 1  # cut off by the damage, which is told below
                continue
            yield found
        if damage := damage_of(content):
            yield Bad(f"{place} {number + 1}", damage)


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


def _parsed(line: bytes, fields: Fields, place: str, number: int) -> Document | Bad:
    where = f"{place} {number}"
    try:
        text, is_utf8 = line.decode("utf-8-sig"), True
    except UnicodeDecodeError:  # does no harm in an id, or in a field that is not used
        text, is_utf8 = line.decode("utf-8-sig", "surrogateescape"), False
    try:
        found = document(json.loads(text), fields, place, number)
    except (ValueError, RecursionError) as error:
        # Without the position of the error, so that reasons can be counted.
        return Bad(where, f"not JSON: {getattr(error, 'msg', error)}" if is_utf8 else "not UTF-8")
    if is_utf8 or isinstance(found, Bad):
        return found
    escapes = re.search("[\udc80-\udcff]", found.data.decode("utf-8", "surrogatepass"))
    return Bad(where, "not UTF-8") if escapes else found


def document(record, fields: Fields, place: str, number) -> Document | Bad:
    """Makes a document of a record, a dict of fields; place and number: "web/1.jsonl:line", 17.

    Ids and languages may be bytes that are not UTF-8.
    """
    where = f"{place} {number}"
    if not isinstance(record, dict):
        return Bad(where, f"a {type(record).__name__} in the place of an object with fields")
    try:
        text = _text(record, fields)
    except ValueError as error:
        return Bad(where, str(error))
    ids = (record.get(name) for name in fields.id)
    name = next(
        (_name(i) for i in ids if isinstance(i, (str, bytes, int)) and i not in ("", b"")), ""
    )
    language = next((record[name] for name in fields.language if name in record), "")
    if isinstance(language, str):
        language = undecoded(language)
    known = isinstance(language, bytes)
    return Document(
        name or f"{place.rpartition(':')[0]}:{number}",
        text,
        language.decode("utf-8", "backslashreplace") if known else "",
    )


def _text(record: dict, fields: Fields) -> bytes:
    """Returns the text of a record. Raises ValueError where it has none."""
    if fields.chat is not None:
        return conversations.of_record(record, fields.chat)
    field = next((name for name in fields.text if name in record), None)
    if field is None:
        raise ValueError(no_field(fields, record))
    text = record[field]
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")
    if not isinstance(text, bytes):
        raise ValueError(f"field {field!r} holds a {type(text).__name__} instead of a string")
    return text


def _name(identity: str | bytes | int) -> str:
    return (
        identity.decode("utf-8", "surrogateescape")
        if isinstance(identity, bytes)
        else str(identity)
    )


def undecoded(text: str) -> bytes:
    """Returns the bytes of a string that may hold surrogates.

    They stand for bytes that are not UTF-8, as in file names, or were written in JSON.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def no_field(fields: Fields, names: Iterable[str]) -> str:
    """Returns why a record with fields of other names is no document."""
    names = [str(name)[:40] for name in names]
    more = f" and {len(names) - _SHOWN_FIELDS} more" if len(names) > _SHOWN_FIELDS else ""
    shown = ", ".join(map(repr, names[:_SHOWN_FIELDS])) or "none"
    return f"no field {' or '.join(map(repr, fields.text))}; the fields there are {shown}{more}"


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
    os.stat(path)  # raises where the file is gone
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
            yield Bad(f"{file}:record {number}", f"it is damaged: {error}")
            reader = ArrayRecordReader(path)  # the old one does not go on
            reader.seek(number + 1)
            continue
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
