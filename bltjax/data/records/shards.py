"""Reads and writes shards of records: files of documents and entropies with random access.

A shard is up to three files with one stem: `.array_record`, a record per document;
`.entropies.array_record`, as many records of raw little-endian float16; `.scores.npz`, histograms
of the entropies by language, and which model they are from. The entropies file is written last: it
marks both as complete. Scores that are missing beside it are counted from it.
"""

import bisect
import collections
import contextlib
import errno
import io
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from bltjax.data.sources.units import Document
from bltjax.patching.calibrate import ScoreHistogram
from bltjax.runtime import object_cache
from bltjax.runtime.files import PARTIAL, replacing
from bltjax.runtime.paths import as_path, is_remote, read_whole, remove
from bltjax.runtime.system_errors import FAULTS, reading, writing

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
    digest: str = ""  # of the documents; "" in records of version 0.1
    with_entropies: bool = False  # that came with the documents

    @property
    def path(self) -> Path:
        return as_path(f"{self.stem}.array_record")

    @property
    def entropies_path(self) -> Path:
        return as_path(f"{self.stem}.entropies.array_record")

    @property
    def scores_path(self) -> Path:
        return as_path(f"{self.stem}.scores.npz")


class Documents:
    """Random access to the documents of shards, as a data source for Grain.

    Item i is the i-th document in the order of the shards. entropies: documents come with their
    entropies, float16 [len(data) + 2]. Readers are opened when needed, and a bounded number stays
    open; threads may share them, and pickling drops them. Files in a bucket are read from local
    copies; copies: settings of those, where another process has checked the shards. Raises
    FileNotFoundError where entropies are wanted and a shard has none, ValueError for a damaged
    file.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        entropies: bool = False,
        copies: object_cache.Settings | None = None,
    ):
        if copies is not None:
            object_cache.use(copies)
        self.shards = list(shards)
        self.entropies = entropies
        self.ends = list(itertools.accumulate(shard.documents for shard in self.shards))
        for shard in self.shards if entropies and copies is None else ():
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
        return Documents, (self.shards, self.entropies, object_cache.settings())

    def _read(self, path: Path, num_records: int, position: int, again: bool = True) -> bytes:
        with self._lock:
            reader = self._readers.pop(path, None) or _reader(path, num_records)
            self._readers[path] = reader
            if len(self._readers) > OPEN_READERS * (1 + self.entropies):
                # Closed when the last thread that reads from it lets go of it.
                self._readers.popitem(last=False)
        try:
            return reader.read([position])[0]
        except (RuntimeError, IndexError) as error:
            if not (again and is_remote(path)):
                raise damaged(path, str(error)) from error
        with self._lock:  # the local copy may be what is damaged
            self._readers.pop(path, None)
            object_cache.drop(path)
        return self._read(path, num_records, position, again=False)


def size_of(path: Path) -> int | None:
    """Returns the bytes of a file of a store; None where it is not there."""
    if is_remote(path):
        found = object_cache.known(path)
        return found and found.size
    return path.stat().st_size if path.exists() else None


def has_entropies(shard: Shard) -> bool:
    return size_of(shard.entropies_path) is not None


def without_entropies(directory: Path, shards: Iterable[Shard]) -> list[Shard]:
    """Returns those shards of a store that have no entropies, with one listing of a bucket."""
    if not is_remote(directory):
        return [shard for shard in shards if not has_entropies(shard)]
    object_cache.learn(directory)
    return [shard for shard in shards if not object_cache.is_known(shard.entropies_path)]


def drop_entropies(shard: Shard):
    """Deletes the entropies of a shard, if it has any."""
    for path in (shard.entropies_path, shard.scores_path):
        drop(path)


def drop(path: Path):
    """Deletes a file of a store, if it is there."""
    with writing(path):
        remove(path)
    if is_remote(path):
        object_cache.forget(path)


def write_entropies(shard: Shard, entropies: Iterable[np.ndarray], model: str = ""):
    """Stores the entropies of a shard's documents, in order: nats, [len(data) + 2] each.

    They are rounded to float16, and so are the histograms that thresholds are calibrated on.
    model: identifies the model they are from; "" where they came with the documents. Raises
    ValueError where the number of arrays or the length of one is wrong.
    """
    histograms = _Histograms()
    with replacing_records(shard.entropies_path) as writer:
        for document, row in zip(Documents([shard]), entropies, strict=True):
            row = np.asarray(row, "<f2")
            if row.shape != (len(document.data) + 2,):
                raise ValueError(
                    f"entropies of shape {row.shape} for {document.name!r} of {len(document.data)} "
                    "bytes: give one per byte and one each for BOS and EOS"
                )
            writer.write(row.tobytes())
            histograms.add(document.language, row)
        with writing(shard.scores_path), replacing(shard.scores_path) as file:
            # Languages as JSON, so that names in the file are printable.
            np.savez_compressed(
                file,
                model=model,
                **{
                    f"{json.dumps(language)}/{name}": array
                    for language, histogram in histograms.items()
                    for name, array in histogram.arrays().items()
                },
            )


class _Histograms(dict):
    """Histograms of the scores by language; those of many languages are joined under ""."""

    def add(self, language: str, row: np.ndarray):
        known = language in self or len(self) < LANGUAGES
        self.setdefault(language if known else "", ScoreHistogram()).add(row)


def score_histogram(shards: Iterable[Shard]) -> dict[tuple[str, str], ScoreHistogram]:
    """Returns the histograms for calibrating thresholds, by (source, language).

    Raises FileNotFoundError for a shard without entropies, ValueError for damaged ones.
    """
    total = collections.defaultdict(ScoreHistogram)
    for shard in shards:
        _check_has_entropies(shard)
        for language, histogram in _scores(shard).items():
            total[shard.source, language].merge(histogram)
    return dict(total)


def model_of(shard: Shard) -> str:
    """Returns the `model` of `write_entropies`; "" in records of version 0.1 too."""
    return str(_arrays(shard).get("model", "")) if size_of(shard.scores_path) is not None else ""


def _scores(shard: Shard) -> dict[str, ScoreHistogram]:
    """Returns the histograms of a shard by language."""
    if size_of(shard.scores_path) is None:
        counted = _Histograms()
        for document in Documents([shard], entropies=True):
            counted.add(document.language, document.entropies)
        return counted
    by_language = collections.defaultdict(dict)
    arrays = _arrays(shard)
    try:
        for key, array in arrays.items():
            if key != "model":
                language, name = key.rsplit("/", 1)
                by_language[json.loads(language)][name] = array
        found = {name: ScoreHistogram.from_arrays(a) for name, a in by_language.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(shard.scores_path, str(error)) from error
    documents = sum(histogram.num_documents for histogram in found.values())
    positions = sum(histogram.num_positions for histogram in found.values())
    if (documents, positions) != (shard.documents, shard.num_bytes + 2 * shard.documents):
        raise damaged(shard.scores_path, f"{documents} documents of {shard.documents}")
    return found


def _arrays(shard: Shard) -> dict[str, np.ndarray]:
    """Reads the scores of a shard as they are stored."""
    with reading(shard.scores_path):
        raw = read_whole(shard.scores_path)
    try:
        with np.load(io.BytesIO(raw)) as stored:
            return dict(stored)
    except Exception as error:  # A flipped bit in a ZIP file raises errors of any kind.
        raise damaged(shard.scores_path, str(error)) from error


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


class RecordWriter:
    """Writes records to a file that becomes `target`; UnwritableError where the disk refuses."""

    def __init__(self, path: Path, target: Path):
        self._path = target
        with writing(target):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _writing_records(target):
            self._writer = ArrayRecordWriter(str(path), "group_size:1")

    def write(self, record: bytes):
        with _writing_records(self._path):
            self._writer.write(record)

    def close(self):
        with _writing_records(self._path):
            self._writer.close()


@contextlib.contextmanager
def _writing_records(path: Path):
    """Tells errors of ArrayRecord, which has those of the disk in its text, as `writing` does."""
    with writing(path):
        try:
            yield
        except RuntimeError as error:
            reasons = {code: os.strerror(code) for code in FAULTS}
            codes = [code for code, reason in reasons.items() if reason in str(error)]
            raise OSError(codes[0] if codes else errno.EIO, str(error)) from error


@contextlib.contextmanager
def replacing_records(path: Path) -> Iterator[RecordWriter]:
    """Yields a writer of records whose file becomes `path` if the block ends without an error.

    For one in a bucket it is written on the local disk, and then sent.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="shard-", dir=object_cache.directory()) as scratch:
            local = Path(scratch) / path.name
            with replacing_records(local) as writer:
                yield writer
            with writing(path):
                object_cache.send(local, path)
        return
    partial = path.with_suffix(PARTIAL)
    writer = RecordWriter(partial, path)
    try:
        yield writer
        writer.close()
        with writing(path):
            os.replace(partial, path)
    except BaseException:  # The first error is the one to be told.
        with contextlib.suppress(OSError):
            writer.close()
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _reader(path: Path, num_records: int) -> ArrayRecordReader:
    local = object_cache.local_copy(path) if is_remote(path) else path
    options = "readahead_buffer_size:0,max_parallelism:0"  # for random access
    reader = ArrayRecordReader(str(local), options, file_reader_buffer_size=32_768)
    if not reader.ok() or reader.num_records() != num_records:
        with reading(path):  # The fault may be in the system, and not in the file.
            local.open("rb").close()
        raise damaged(path, f"{num_records} records expected, {reader.num_records()} found")
    return reader


def damaged(path: Path, what: str, remedy: str = "delete it") -> ValueError:
    """Returns an error for a file of a store; what is deleted is made anew by the next run."""
    return ValueError(
        f"{path} is damaged ({what}): {remedy} and run bltjax.preprocess or bltjax.train again, "
        "which makes it anew"
    )
