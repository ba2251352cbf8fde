"""Lists the files of a folder, reads them as documents, and measures a model's bits per byte."""

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


class Sums:
    """Sums over the documents of a source or of a language, with their size under xz if wanted."""

    def __init__(self, compress: bool = True):
        self.documents = self.num_bytes = self.num_patches = self.xz_bytes = 0
        self.nats = []
        self._xz = lzma.LZMACompressor(preset=9) if compress else None

    def add(self, data: bytes, score):
        self.documents += 1
        self.num_bytes += score.num_bytes
        self.num_patches += score.num_patches
        self.nats.append(score.nats)
        if self._xz:
            self.xz_bytes += len(self._xz.compress(data))

    def close(self):
        """Ends the compression and frees its dictionary, which is large."""
        self.xz_bytes += len(self._xz.flush())
        self._xz = None

    def report(self) -> dict:
        """Returns the sums and their ratios. Patches include those of BOS and EOS."""
        nats, positions = math.fsum(self.nats), self.num_bytes + 2 * self.documents
        return dict(
            documents=self.documents,
            num_bytes=self.num_bytes,
            nats=nats,
            bits_per_byte=_ratio(nats / math.log(2), self.num_bytes),
            mean_patch_bytes=_ratio(positions, self.num_patches),
            xz_bits_per_byte=_ratio(8 * self.xz_bytes, self.num_bytes) if self.xz_bytes else None,
        )


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
    sums, languages = measure(model, files, unreadable, options)
    bar.close()
    result = dict(
        sources={name: s.report() for name, s in sums.items()},
        languages={name: s.report() for name, s in sorted(languages.items())},
        **total(sums).report(),
        unreadable=unreadable,
    )
    _print_reports("source", result["sources"] | ({"all": result} if len(sums) > 1 else {}))
    if languages:
        print()
        _print_reports("language", result["languages"])
    warn_of_unreadable(unreadable)
    return result


def chosen_files(path: str | Path, max_bytes: int | None, unreadable: list[str]) -> list[File]:
    """Returns the files at `path`, up to `max_bytes` together; ValueError where there is none."""
    files = list(_within(list_files(Path(path), unreadable), max_bytes))
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


def measure(
    model, files: list[File], unreadable: list[str], options: dict
) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """Returns the sums of each source, in order, and of each language that is known.

    The documents of a source follow each other, so only one compression is open at a time.
    """
    sums, languages = {}, {}
    documents = read_documents(files, unreadable)
    for chunk in in_chunks(documents, lambda document: len(document.data), READ_BYTES):
        scores = model.score([document.data for document in chunk], **options)
        for (source, language, data), score in zip(chunk, scores, strict=True):
            if source not in sums:
                if sums:
                    sums[next(reversed(sums))].close()
                sums[source] = Sums()
            sums[source].add(data, score)
            if language:
                languages.setdefault(language, Sums(compress=False)).add(data, score)
    if sums:
        sums[next(reversed(sums))].close()
    return sums, languages


def total(sums: dict[str, Sums]) -> Sums:
    """Adds up all sources; their sizes under xz are added too."""
    result = Sums(compress=False)
    for s in sums.values():
        for name in ("documents", "num_bytes", "num_patches", "xz_bytes", "nats"):
            setattr(result, name, getattr(result, name) + getattr(s, name))
    return result


def _print_reports(kind: str, reports: dict[str, dict]):
    rows = [(name, *(report[key] for key in _REPORTED)) for name, report in reports.items()]
    print_table((kind, *_COLUMNS), rows)


def _within(files: list[File], max_bytes: int | None) -> Iterator[File]:
    num_bytes = 0
    for file in files:
        num_bytes += file.num_bytes
        if max_bytes is not None and num_bytes > max_bytes:
            return
        yield file


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
