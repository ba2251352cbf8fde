"""Reads documents from parts of Parquet and Arrow files; see `readers` for the rules.

Strings are never decoded: no byte of theirs can make a row unreadable. A damaged part of a file
(row group, record batch) is a Bad, and the parts behind it are read.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np

from bltjax.data.sources.libraries import need
from bltjax.data.sources.readers import (
    Bad,
    Document,
    Fields,
    document,
    end_of,
    no_field,
    open_file,
)
from bltjax.patching.calibrate import MAX_NATS

ENTROPIES = "entropies"  # column of Meta's preprocessed files (model.md#files)
_ROWS = 256  # rows of a Parquet file that are decoded at a time


def parquet_groups(path: str) -> list[tuple[int, int]] | None:
    """Returns (bytes in memory, about bytes on disk) of each row group; None for a damaged file."""
    parquet = need("pyarrow.parquet", "data")
    with open_file(path) as raw:
        try:
            metadata = parquet.ParquetFile(raw).metadata
        except Exception as error:
            _raise_unless_damage(error)
            return None
        raw.seek(0, os.SEEK_END)
        # Not the sizes of the columns: pyarrow ends the process where theirs are damaged.
        groups = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
        return [(size, raw.tell() * size // max(sum(groups), 1)) for size in groups]


def read_parquet(
    path: str, file: str, start: int, stop: int, fields: Fields
) -> Iterator[Document | Bad]:
    """Yields the rows of row groups [start, stop), where -1 is the end; reads needed columns."""
    parquet = need("pyarrow.parquet", "data")

    def parts(raw):
        opened = parquet.ParquetFile(raw, page_checksum_verification=True)
        names = opened.schema_arrow.names
        columns = [name for name in names if name in fields.every and names.count(name) == 1]
        row = sum(opened.metadata.row_group(i).num_rows for i in range(start))
        for group in range(opened.num_row_groups)[start : end_of(stop)]:
            yield names, f"row group {group}", _numbered(opened, group, columns, row)
            row += opened.metadata.row_group(group).num_rows

    yield from _table_documents(parts, path, file, fields)


def _numbered(opened, group: int, columns: list[str], row: int) -> Iterator[tuple]:
    """Yields (row numbers, record batch) for a row group of a Parquet file that begins at `row`."""
    if not opened.metadata.row_group(group).num_rows:
        return
    for batch in opened.iter_batches(_ROWS, row_groups=[group], columns=columns):
        yield range(row, row + batch.num_rows), batch
        row += batch.num_rows


def arrow_layout(path: str) -> tuple[int, bool] | None:
    """Returns (number of record batches, True if it has entropies); None for a damaged file.

    A file in the stream format has no index and is read whole, so it counts as one batch.
    """
    with open_file(path) as raw:
        try:
            reader = _open_arrow(raw)
            return getattr(reader, "num_record_batches", 1), ENTROPIES in reader.schema.names
        except Exception as error:
            _raise_unless_damage(error)
            return None


def read_arrow(
    path: str, file: str, start: int, stop: int, fields: Fields
) -> Iterator[Document | Bad]:
    """Yields the rows of record batches [start, stop) of an Arrow file; stop -1: to the end.

    Reads the file format, which Meta's preprocessing writes, and the stream format, which Hugging
    Face's `datasets` writes and which is always read whole.
    """

    def parts(raw):
        reader = _open_arrow(raw)
        names = reader.schema.names
        # Counting the rows of earlier batches would mean to read them: rows count in their batch.
        if not hasattr(reader, "get_batch"):
            numbered = (_rows_of(i, batch) for i, batch in enumerate(reader))
            yield names, "record batches", numbered
            return
        for i in range(reader.num_record_batches)[start : end_of(stop)]:
            # Read when it is asked for, so that its damage is its own.
            yield names, f"record batch {i}", (_rows_of(i, reader.get_batch(i)) for i in [i])

    yield from _table_documents(parts, path, file, fields)


def _rows_of(number: int, batch) -> tuple:
    return [f"{number}.{row}" for row in range(batch.num_rows)], batch


def _open_arrow(raw: BinaryIO):
    ipc = need("pyarrow.ipc", "data")
    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    return ipc.open_file(raw) if is_file else ipc.open_stream(raw)


def _table_documents(
    parts: Callable[[BinaryIO], Iterable], path: str, file: str, fields: Fields
) -> Iterator[Document | Bad]:
    """Yields a document for each row.

    parts: takes the opened file; yields (column names, name of the part, its batches), and each
    batch is (row numbers, record batch).
    """
    part, last = "", None
    with open_file(path) as raw:
        try:
            for names, part, batches in parts(raw):
                if twice := _named_twice(names, fields):
                    reason = (
                        f"{names.count(twice)} columns are named {twice!r}, so the text is not "
                        "known: rename them, or name another field"
                    )
                    yield Bad(file, reason)
                    return
                try:
                    for numbers, batch in batches:
                        yield from _batch_documents(numbers, batch, names, file, fields)
                        last = numbers[-1] if len(numbers) else last
                except Exception as error:
                    _raise_unless_damage(error)
                    yield Bad(file, f"{part} is cut off or damaged{_after(last)}: {_told(error)}")
        except Exception as error:
            _raise_unless_damage(error)
            yield Bad(file, f"the file is cut off or damaged{_after(last)}: {_told(error)}")


def _told(error: Exception) -> str:
    return str(error) or "it asks for more memory than there is"


def _after(row) -> str:
    return " from its beginning on" if row is None else f" after row {row}"


def _named_twice(names: list[str], fields: Fields) -> str | None:
    """Returns the name of the text column where several columns have it."""
    text = next((name for name in fields.text if name in names), None)
    return text if names.count(text) > 1 else None


def _batch_documents(
    numbers: Iterable, batch, names: list[str], file: str, fields: Fields
) -> Iterator[Document | Bad]:
    reason = _no_text(batch, names, fields)
    entropies = _entropies(batch)
    for i, (number, record) in enumerate(zip(numbers, _rows(batch, fields), strict=True)):
        where = f"{file}:row {number}"
        found = Bad(where, reason) if reason else document(record, fields, f"{file}:row", number)
        if entropies is not None:
            found = _with_entropies(found, entropies[i], where)
        yield found


def _raise_unless_damage(error: Exception) -> None:
    """Raises errors of the disk or the network again: they may pass, and the file is sound."""
    lib = need("pyarrow", "data").lib
    plain = type(error) is OSError and error.errno is None  # pyarrow's, about content
    # A damaged length may ask for any memory.
    if not plain and not isinstance(error, (lib.ArrowException, UnicodeDecodeError, MemoryError)):
        raise error


def _no_text(batch, names: list[str], fields: Fields) -> str | None:
    """Returns why no row of a batch can be a document, None where they can."""
    if fields.chat is not None:
        return None  # each record says it
    field = next((name for name in fields.text if name in names), None)
    if field is None:
        return no_field(fields, names)
    kind = batch.schema.field(field).type
    return None if _is_text(kind) else f"field {field!r} is a column of {kind}, not of strings"


def _rows(batch, fields: Fields) -> Iterator[dict]:
    """Yields each row as a dict of the wanted columns, strings as bytes."""
    columns, names = {}, batch.schema.names
    for name, column in zip(names, batch.columns, strict=True):
        if names.count(name) > 1:
            continue
        if name in fields.text and fields.chat is not None:
            column.validate(full=True)
            columns[name] = column.to_pylist()
        elif name in fields.text and _is_text(column.type):
            columns[name] = _undecoded(column)
        elif name in fields.id + fields.language:
            columns[name] = _identities(column)
    for i in range(batch.num_rows):
        yield {name: values[i] for name, values in columns.items()}


def _is_text(kind) -> bool:
    return _is_string(kind) or any(
        getattr(need("pyarrow", "data").types, f"is_{name}")(_decoded(kind))
        for name in ("binary", "large_binary", "binary_view", "fixed_size_binary")
    )


def _is_string(kind) -> bool:
    types, kind = need("pyarrow", "data").types, _decoded(kind)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _decoded(kind):
    return kind.value_type if need("pyarrow", "data").types.is_dictionary(kind) else kind


def _undecoded(column) -> list[bytes | None]:
    """Returns strings as bytes. Raises ArrowInvalid where offsets of a damaged file lead astray."""
    pa = need("pyarrow", "data")
    if pa.types.is_dictionary(column.type):
        values = _as_binary(column.dictionary)
        column.indices.validate(full=True)
        column = pa.DictionaryArray.from_arrays(column.indices, values).dictionary_decode()
    return _as_binary(column).to_pylist()


def _as_binary(column):
    pa = need("pyarrow", "data")
    types = pa.types
    if types.is_string(column.type):
        column = column.view(pa.binary())
    elif types.is_large_string(column.type):
        column = column.view(pa.large_binary())
    elif types.is_string_view(column.type):
        column = column.view(pa.binary_view())
    column.validate(full=True)  # not of strings, whose UTF-8 it would check
    return column


def _identities(column) -> list:
    """Returns ids or languages: strings as bytes, integers, and None for values of other types."""
    types = need("pyarrow", "data").types
    if _is_string(column.type):
        return _undecoded(column)
    if not types.is_integer(column.type) and not types.is_boolean(column.type):
        return [None] * len(column)
    column.validate(full=True)
    return column.to_pylist()


def _entropies(batch):
    """Returns the column of entropies, a list of numbers in each row; None where there is none."""
    types = need("pyarrow", "data").types
    if batch.schema.names.count(ENTROPIES) != 1:
        return None
    column = batch.column(ENTROPIES)
    if not types.is_list(column.type) and not types.is_large_list(column.type):
        return None
    column.validate(full=True)
    return column


def _with_entropies(found: Document | Bad, scalar, where: str) -> Document | Bad:
    if isinstance(found, Bad):
        return found
    values = np.empty(0) if scalar.values is None else scalar.values.to_numpy(zero_copy_only=False)
    possible = (values >= 0) & (values <= MAX_NATS)  # NaN is neither
    if len(values) != len(found.data) + 2 or not possible.all():
        return Bad(
            where, f"its entropies are not 2 more numbers of 0 to {MAX_NATS} than it has bytes"
        )
    return found._replace(entropies=values.astype(np.float16))
