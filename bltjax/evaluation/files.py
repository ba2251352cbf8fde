"""Lists the files of a folder, reads them as documents, and measures a model's bits per byte."""

import collections
import itertools
import lzma
import math
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bltjax.config.data import DataConfig
from bltjax.data.sources.files import ENDINGS
from bltjax.data.sources.readers import Document, Fields, in_chunks, read_jsonl
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import json_number, print_table, printable

READ_BYTES = 16_000_000  # of documents in memory at a time
TOP = "."  # the source of files that are in no subdirectory
_COLUMNS = ("documents", "bytes", "bits/byte", "bytes/patch", "xz")
_REPORTED = ("documents", "num_bytes", "bits_per_byte", "mean_patch_bytes", "xz_bits_per_byte")


class File(NamedTuple):
    """A file to read. `source` is the top-level directory that it is in."""

    source: str
    path: Path
    num_bytes: int


class TextOfSource(NamedTuple):
    """A document: the source it counts for, its language ("" where unknown) and its bytes."""

    source: str
    language: str
    data: bytes


def evaluate(
    model, path: str | Path, max_bytes: int | None = None, row_bytes: int | None = None
) -> dict:
    """Scores the files at `path`, prints a table of their sources, and returns its numbers.

    max_bytes: files are left out from the first one that would take the total above it; none is
    cut. row_bytes: as in `model.score`. xz compresses the documents of each source as one stream.
    Files and lines that cannot be read are left out and listed in `unreadable`. Raises
    FileNotFoundError without `path` and ValueError where no file is left.
    """
    unreadable = []
    files = chosen_files(path, max_bytes, unreadable)
    bar = progress_bar("evaluating", sum(file.num_bytes for file in files))
    options = dict(row_bytes=row_bytes, on_progress=bar.update)
    by_source, by_language, xz_bytes = measure(model, files, unreadable, options)
    bar.close()
    everything = [score for scores in by_source.values() for score in scores]
    result = dict(
        sources={name: report(scores, xz_bytes[name]) for name, scores in by_source.items()},
        languages={name: report(scores) for name, scores in sorted(by_language.items())},
        **report(everything, xz_bytes.total()),
        unreadable=unreadable,
    )
    _print_reports("source", result["sources"] | ({"all": result} if len(by_source) > 1 else {}))
    if by_language:
        print()
        _print_reports("language", result["languages"])
    warn_of_unreadable(unreadable)
    return result


def chosen_files(path: str | Path, max_bytes: int | None, unreadable: list[str]) -> list[File]:
    """Returns the files at `path`, up to `max_bytes` together; ValueError where there is none."""
    files = list_files(Path(os.path.expanduser(path)), unreadable)
    if max_bytes is not None:
        totals = itertools.accumulate(file.num_bytes for file in files)
        files = files[: sum(total <= max_bytes for total in totals)]
    if not files:
        raise no_file(path, unreadable, f" within max_bytes={max_bytes}")
    return files


def no_file(path: str | Path, unreadable: list[str], limit: str = "") -> ValueError:
    """Returns the error for a folder without a file that can be read."""
    return ValueError(
        f"no file can be read at {str(path)!r}{limit} ({len(unreadable)} unreadable; hidden files "
        "are left out): choose another path"
    )


def warn_of_unreadable(unreadable: list[str]):
    """Names on stderr what could not be read, if there was anything."""
    if unreadable:
        shown = ", ".join(map(printable, unreadable))
        print(f"{len(unreadable)} could not be read: {shown}", file=sys.stderr)


def list_files(path: Path, unreadable: list[str]) -> list[File]:
    """Returns the files below `path`, sorted by source and path.

    Paths that cannot be read are added to `unreadable`. Hidden files and directories, linked
    directories, and whatever is neither a regular file nor a link to one are left out.
    """
    if not path.is_dir():
        return [File(path.name, path, path.stat().st_size)]
    found = []
    for directory, subdirectories, names in os.walk(
        path, onerror=lambda error: unreadable.append(error.filename)
    ):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        parts = Path(directory).relative_to(path).parts
        for name in names:
            file = Path(directory, name)
            if name.startswith("."):
                continue
            try:
                info = file.stat()
            except OSError:
                unreadable.append(str(file))
                continue
            if stat.S_ISREG(info.st_mode):
                found.append(File(parts[0] if parts else TOP, file, info.st_size))
    return sorted(found, key=lambda file: (file.source, file.path.parts))


def read_beginning(path: str | Path, max_bytes: int | None) -> bytes:
    """Returns the first `max_bytes` of a file, or all of it (None); "-" is standard input."""
    limit = -1 if max_bytes is None else max_bytes
    if str(path) == "-":
        return sys.stdin.buffer.read(limit)
    with open(path, "rb") as file:
        return file.read(limit)


def read_documents(files: Iterable[File], unreadable: list[str]) -> Iterator[TextOfSource]:
    """Yields the documents of files; what cannot be read is added to `unreadable`."""
    for file in files:
        try:
            yield from _documents(file, unreadable)
        except OSError:
            unreadable.append(str(file.path))


def measure(model, files: list[File], unreadable: list[str], options: dict):
    """Scores the documents of files.

    Returns scores by source, in order, scores by language where it is known, and the bytes of each
    source under xz.
    """
    by_source, by_language = collections.defaultdict(list), collections.defaultdict(list)
    xz_bytes = collections.Counter()
    documents = _compressed(read_documents(files, unreadable), xz_bytes)
    for chunk in in_chunks(documents, lambda document: len(document.data), READ_BYTES):
        scores = model.score([document.data for document in chunk], **options)
        for document, score in zip(chunk, scores, strict=True):
            by_source[document.source].append(score)
            if document.language:
                by_language[document.language].append(score)
    return by_source, by_language, xz_bytes


def _compressed(documents: Iterable[TextOfSource], xz_bytes: dict) -> Iterator[TextOfSource]:
    """Yields documents, whose size under xz is added to that of their source.

    Those of a source follow each other, so only one dictionary, which is large, is in memory.
    """
    for source, group in itertools.groupby(documents, key=lambda document: document.source):
        xz = lzma.LZMACompressor(preset=9)
        for document in group:
            xz_bytes[source] += len(xz.compress(document.data))
            yield document
        xz_bytes[source] += len(xz.flush())


def report(scores: list, xz_bytes: int = 0) -> dict:
    """Returns sums over documents and their ratios. Patches include those of BOS and EOS."""
    num_bytes = sum(score.num_bytes for score in scores)
    nats = math.fsum(score.nats for score in scores)
    num_patches = sum(score.num_patches for score in scores)
    return dict(
        documents=len(scores),
        num_bytes=num_bytes,
        nats=nats,
        bits_per_byte=_ratio(nats / math.log(2), num_bytes),
        mean_patch_bytes=_ratio(num_bytes + 2 * len(scores), num_patches),
        xz_bits_per_byte=_ratio(8 * xz_bytes, num_bytes) if xz_bytes else None,
    )


def _print_reports(kind: str, reports: dict[str, dict]):
    rows = [(name, *(report[key] for key in _REPORTED)) for name, report in reports.items()]
    print_table((kind, *_COLUMNS), rows)


def _documents(file: File, unreadable: list[str]) -> Iterator[TextOfSource]:
    """Yields each line of a JSON lines file, and any other file as one document."""
    ending = next((e for e in ENDINGS["jsonl"] if file.path.name.endswith(e)), None)
    if ending is None:
        yield TextOfSource(file.source, "", file.path.read_bytes())
        return
    source = file.path.name.removesuffix(ending) if file.source == TOP else file.source
    names = DataConfig()
    fields = Fields(names.text_fields, names.id_fields, names.language_fields)
    for found in read_jsonl(str(file.path), file.path.name, 0, -1, fields):
        if isinstance(found, Document):
            yield TextOfSource(source, found.language, found.data)
        else:
            unreadable.append(f"{file.path.name}: {found.reason}")


def _ratio(amount: float, of: int) -> float | None:
    return json_number(amount / of if of else math.nan)
