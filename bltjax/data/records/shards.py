"""Reads and writes shards of records: files of documents and entropies with random access.

A shard is up to three files with one stem: `.array_record`, a record per document;
`.entropies.array_record`, as many records of raw little-endian float16; `.scores.npz`, histograms
of the entropies by language. The entropies file is written last: it marks both as complete.
"""

import bisect
import collections
import contextlib
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from bltjax.data.sources.units import Document
from bltjax.patching.calibrate import ScoreHistogram
from bltjax.runtime.files import PARTIAL, replacing

LANGUAGES = 256  # languages of a shard that get histograms of their own
OPEN_READERS = 128  # of documents, and as many of entropies; a process can open about 1000 files


class Shard(NamedTuple):
    """A file of documents of one source and part."""

    stem: str  # path without the suffix
    source: str
    part: str
    documents: int
    num_bytes: int  # of the documents
    file_bytes: int
    languages: dict[str, list[int]]  # [documents, bytes] of each

    def identity(self, directory: Path) -> dict:
        """Returns what is in the shard, whatever the size of its file, and its place below."""
        fields = self._asdict() | {"stem": os.path.relpath(self.stem, directory)}
        return {name: value for name, value in fields.items() if name != "file_bytes"}

    @property
    def path(self) -> Path:
        return Path(f"{self.stem}.array_record")

    @property
    def entropies_path(self) -> Path:
        return Path(f"{self.stem}.entropies.array_record")

    @property
    def scores_path(self) -> Path:
        return Path(f"{self.stem}.scores.npz")


class Documents:
    """Random access to the documents of shards, as a data source for Grain.

    Item i is the i-th document in the order of the shards. entropies: documents come with their
    entropies, float16 [len(data) + 2]. Readers are opened when needed, and a bounded number stays
    open; threads may share them, and pickling drops them. Raises FileNotFoundError where entropies
    are wanted and a shard has none, ValueError for a damaged file.
    """

    def __init__(self, shards: Sequence[Shard], entropies: bool = False):
        self.shards = list(shards)
        self.entropies = entropies
        self.ends = list(itertools.accumulate(shard.documents for shard in self.shards))
        for shard in self.shards if entropies else ():
            _check_has_entropies(shard)
        self._readers: collections.OrderedDict[Path, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = bisect.bisect_right(self.ends, index)
        shard = self.shards[number]
        position = int(index) - (self.ends[number] - shard.documents)
        document = _decoded(self._read(shard.path, shard.documents, position))
        if not self.entropies:
            return document
        raw = self._read(shard.entropies_path, shard.documents, position)
        entropies = np.frombuffer(raw, "<f2")
        if len(entropies) != len(document.data) + 2:
            what = f"{len(entropies)} entropies for {len(document.data)} bytes"
            raise damaged(shard.entropies_path, what)
        return document._replace(entropies=entropies)

    def __reduce__(self):
        return Documents, (self.shards, self.entropies)

    def _read(self, path: Path, num_records: int, position: int) -> bytes:
        with self._lock:
            reader = self._readers.pop(path, None) or _reader(path, num_records)
            self._readers[path] = reader
            if len(self._readers) > OPEN_READERS * (1 + self.entropies):
                # Closed when the last thread that reads from it lets go of it.
                self._readers.popitem(last=False)
        try:
            return reader.read([position])[0]
        except RuntimeError as error:
            raise damaged(path, str(error)) from error


def has_entropies(shard: Shard) -> bool:
    return shard.entropies_path.exists()


def write_entropies(shard: Shard, entropies: Iterable[np.ndarray]):
    """Stores the entropies of a shard's documents, in order: nats, [len(data) + 2] each.

    They are rounded to float16, and so are the histograms that thresholds are calibrated on. Raises
    ValueError where the number of arrays or the length of one is wrong.
    """
    histograms = collections.defaultdict(ScoreHistogram)
    with replacing_records(shard.entropies_path) as writer:
        for document, row in zip(Documents([shard]), entropies, strict=True):
            row = np.asarray(row, "<f2")
            if row.shape != (len(document.data) + 2,):
                raise ValueError(
                    f"entropies of shape {row.shape} for {document.name!r} of {len(document.data)} "
                    "bytes: give one per byte and one each for BOS and EOS"
                )
            writer.write(row.tobytes())
            known = document.language in histograms or len(histograms) < LANGUAGES
            histograms[document.language if known else ""].add(row)
        with replacing(shard.scores_path) as file:
            # Languages as JSON, so that names in the file are printable.
            np.savez_compressed(
                file,
                **{
                    f"{json.dumps(language)}/{name}": array
                    for language, histogram in histograms.items()
                    for name, array in histogram.arrays().items()
                },
            )


def score_histogram(shards: Iterable[Shard]) -> dict[tuple[str, str], ScoreHistogram]:
    """Returns the histograms for calibrating thresholds, by (source, language).

    Raises FileNotFoundError for a shard without entropies.
    """
    total = collections.defaultdict(ScoreHistogram)
    for shard in shards:
        _check_has_entropies(shard)
        by_language = collections.defaultdict(dict)
        with np.load(shard.scores_path) as stored:
            for key in stored.files:
                language, name = key.rsplit("/", 1)
                by_language[json.loads(language)][name] = stored[key]
        for language, arrays in by_language.items():
            total[shard.source, language].merge(ScoreHistogram.from_arrays(arrays))
    return dict(total)


def _check_has_entropies(shard: Shard):
    if not has_entropies(shard):
        raise FileNotFoundError(
            f"no entropies of {shard.path}: make them with bltjax.preprocess and an entropy model"
        )


def encoded(document: Document) -> bytes:
    """Returns a document as a record: length of the JSON header, header, bytes."""
    header = json.dumps({"name": document.name, "language": document.language}).encode()
    return b"".join([len(header).to_bytes(4, "little"), header, document.data])


def _decoded(record: bytes) -> Document:
    end = 4 + int.from_bytes(record[:4], "little")
    header = json.loads(record[4:end])
    return Document(header["name"], record[end:], header["language"])


@contextlib.contextmanager
def replacing_records(path: Path) -> Iterator[ArrayRecordWriter]:
    """Yields a writer of records whose file becomes `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(PARTIAL)
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    try:
        yield writer
    finally:
        writer.close()
    os.replace(partial, path)


def _reader(path: Path, num_records: int) -> ArrayRecordReader:
    options = "readahead_buffer_size:0,max_parallelism:0"  # for random access
    reader = ArrayRecordReader(str(path), options, file_reader_buffer_size=32_768)
    if not reader.ok() or reader.num_records() != num_records:
        raise damaged(path, f"{num_records} records expected, {reader.num_records()} found")
    return reader


def damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged ({what}): delete it and run bltjax.preprocess again")
