"""Reads documents from parts of Parquet and Arrow files; see `readers` for the rules."""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from bltjax.data.sources.readers import Bad, Document, Fields, document, end_of, need, open_file
from bltjax.patching.calibrate import MAX_NATS

ENTROPIES = "entropies"  # column of Meta's preprocessed files (model.md#files)
_ROWS = 256  # rows of a Parquet file that are decoded at a time


def parquet_groups(path: str) -> list[tuple[int, int]] | None:
    """Returns (bytes in memory, bytes on disk) of each row group; None for a damaged file."""
    parquet = need("pyarrow.parquet", "data")
    with open_file(path) as raw:
        try:
            metadata = parquet.ParquetFile(raw).metadata
        except Exception as error:
            _raise_unless_damage(error)
            return None
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return [
            (
                group.total_byte_size,
                sum(group.column(i).total_compressed_size for i in range(group.num_columns)),
            )
            for group in groups
        ]


def read_parquet(
    path: str, file: str, start: int, stop: int, fields: Fields
) -> Iterator[Document | Bad]:
    """Yields the rows of row groups [start, stop), where -1 is the end; reads needed columns."""
    parquet = need("pyarrow.parquet", "data")

    def batches(raw):
        opened = parquet.ParquetFile(raw)
        columns = [name for name in opened.schema_arrow.names if name in sum(fields, ())]
        row = sum(opened.metadata.row_group(i).num_rows for i in range(start))
        for group in range(opened.num_row_groups)[start : end_of(stop)]:
            for batch in opened.iter_batches(_ROWS, row_groups=[group], columns=columns):
                yield range(row, row + batch.num_rows), batch
                row += batch.num_rows

    yield from _table_documents(batches, path, file, fields)


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

    def batches(raw):
        reader = _open_arrow(raw)
        if hasattr(reader, "get_batch"):
            numbers = range(reader.num_record_batches)[start : end_of(stop)]
            numbered = ((i, reader.get_batch(i)) for i in numbers)
        else:
            numbered = enumerate(reader)
        for i, batch in numbered:
            # Counting the rows of earlier batches would mean to read them.
            yield [f"{i}.{row}" for row in range(batch.num_rows)], batch

    yield from _table_documents(batches, path, file, fields)


def _open_arrow(raw: BinaryIO):
    ipc = need("pyarrow.ipc", "data")
    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    return ipc.open_file(raw) if is_file else ipc.open_stream(raw)


def _table_documents(batches, path: str, file: str, fields: Fields) -> Iterator[Document | Bad]:
    """Yields a document for each row; batches(opened file) yields (row numbers, record batch)."""
    last = None
    with open_file(path) as raw:
        try:
            for numbers, batch in batches(raw):
                entropies = _entropies(batch)
                for i, (last, record) in enumerate(zip(numbers, _rows(batch, fields), strict=True)):
                    found = document(record, fields, f"{file}:row", last)
                    if entropies is not None:
                        found = _with_entropies(found, entropies[i], f"{file}:row {last}")
                    yield found
        except Exception as error:
            _raise_unless_damage(error)
            after = "its beginning" if last is None else f"row {last}"
            yield Bad(file, f"the file is cut off or damaged after {after}: {error}")


def _raise_unless_damage(error: Exception) -> None:
    """Raises errors of the disk or the network again: they may pass, and the file is sound."""
    lib = need("pyarrow", "data").lib
    plain = type(error) is OSError and error.errno is None  # pyarrow's, about content
    if not plain and not isinstance(error, (lib.ArrowException, UnicodeDecodeError)):
        raise error


def _rows(batch, fields: Fields) -> Iterator[dict]:
    """Yields each row as a dict of the wanted columns; text stays undecoded."""
    columns = {}
    for name in batch.schema.names:
        if name in fields.text:
            columns[name] = _undecoded(batch.column(name)).to_pylist()
        elif name in fields.id + fields.language:
            columns[name] = batch.column(name).to_pylist()
    for i in range(batch.num_rows):
        yield {name: values[i] for name, values in columns.items()}


def _undecoded(column):
    pa = need("pyarrow", "data")
    is_string = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return column.cast(pa.large_binary()) if is_string else column


def _entropies(batch):
    """Returns the column of entropies, a list of numbers in each row; None where there is none."""
    types = need("pyarrow", "data").types
    if ENTROPIES not in batch.schema.names:
        return None
    column = batch.column(ENTROPIES)
    return column if types.is_list(column.type) or types.is_large_list(column.type) else None


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
