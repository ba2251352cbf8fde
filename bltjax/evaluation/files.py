"""Bits per byte of files, by source and by language."""

import lzma
import math
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bltjax.config.data import DataConfig
from bltjax.data.sources.files import ENDINGS
from bltjax.data.sources.readers import Document, Fields, read_jsonl
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import json_number, printable

READ_BYTES = 16_000_000  # of files in memory at a time


TOP = "."  # the source of files directly in the directory


_COLUMNS = ("documents", "bytes", "bits/byte", "bytes/patch", "xz")


class File(NamedTuple):
    source: str
    path: Path
    num_bytes: int


class Sums:
    """What has been measured of a source, or of a language, which is not compressed."""

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
        """Ends the compression: its dictionary is large, and no second one should be alive."""
        self.xz_bytes += len(self._xz.flush())
        self._xz = None

    def report(self) -> dict:
        """Patches are those of BOS + bytes + EOS, and so is their mean."""
        nats, positions = math.fsum(self.nats), self.num_bytes + 2 * self.documents
        return dict(
            documents=self.documents,
            num_bytes=self.num_bytes,
            nats=nats,
            bits_per_byte=_ratio(nats / math.log(2), self.num_bytes),
            mean_patch_bytes=_ratio(positions, self.num_patches),
            xz_bits_per_byte=_ratio(8 * self.xz_bytes, self.num_bytes) if self.xz_bytes else None,
        )


def evaluate(model, path: str | Path, max_bytes: int | None = None, **options) -> dict:
    """Scores the files at `path`, prints a table of their sources, and returns it.

    options: those of `model.score`. With `max_bytes` files are left out from the first one that
    would take the total above it; none is cut. xz is run over the concatenated bytes of each
    source. What cannot be read, files or lines, is left out, and named in `unreadable`. Raises
    FileNotFoundError without `path` and ValueError where no file is left.
    """
    unreadable = []
    files = chosen_files(path, max_bytes, unreadable)
    bar = progress_bar("evaluating", sum(file.num_bytes for file in files))
    sums, languages = measure(model, files, unreadable, dict(options, on_progress=bar.update))
    bar.close()
    result = dict(
        sources={name: s.report() for name, s in sums.items()},
        languages={name: s.report() for name, s in sorted(languages.items())},
        **total(sums).report(),
        unreadable=unreadable,
    )
    print_table("source", result["sources"], result if len(sums) > 1 else None)
    if languages:
        print()
        print_table("language", result["languages"])
    if unreadable:
        shown = ", ".join(map(printable, unreadable))
        print(f"{len(unreadable)} could not be read: {shown}", file=sys.stderr)
    return result


def chosen_files(path: str | Path, max_bytes: int | None, unreadable: list[str]) -> list[File]:
    """The files at `path`, as far as `max_bytes` goes; ValueError where there is none."""
    files = list(_within(list_files(Path(path), unreadable), max_bytes))
    if not files:
        raise ValueError(
            f"no file can be read at {str(path)!r} within max_bytes={max_bytes} "
            f"({len(unreadable)} unreadable; hidden files are left out): choose another path"
        )
    return files


def list_files(path: Path, unreadable: list[str]) -> list[File]:
    """The files to read, by source and path. Names that cannot be read go to `unreadable`.

    Hidden files and directories are left out, linked directories are not entered, and what is no
    regular file (nor a link to one) is no text.
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


def measure(
    model, files: list[File], unreadable: list[str], options: dict
) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """Sums of each source, in order, and of each language that is known.

    The documents of a source follow each other, so one compression is going on at a time.
    """
    sums, languages = {}, {}
    for chunk in _contents(files, unreadable):
        scores = model.score([data for _, _, data in chunk], **options)
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
    """All sources together; their xz sizes are added."""
    result = Sums(compress=False)
    for s in sums.values():
        for name in ("documents", "num_bytes", "num_patches", "xz_bytes", "nats"):
            setattr(result, name, getattr(result, name) + getattr(s, name))
    return result


def print_table(kind: str, reports: dict[str, dict], of_all: dict | None = None):
    rows = dict(reports) if of_all is None else reports | {"all": of_all}
    names = {name: printable(name) for name in rows}
    width = max(map(len, [kind, *names.values()]))
    print(f"{kind:{width}}" + "".join(f"{column:>13}" for column in _COLUMNS))
    for name, row in rows.items():
        measured = (row["bits_per_byte"], row["mean_patch_bytes"], row["xz_bits_per_byte"])
        cells = [row["documents"], row["num_bytes"]]
        cells += ["-" if x is None else f"{x:.4f}" for x in measured]
        print(f"{names[name]:{width}}" + "".join(f"{cell:>13}" for cell in cells))


def _within(files: list[File], max_bytes: int | None) -> Iterator[File]:
    num_bytes = 0
    for file in files:
        num_bytes += file.num_bytes
        if max_bytes is not None and num_bytes > max_bytes:
            return
        yield file


def _contents(files: list[File], unreadable: list[str]) -> Iterator[list[tuple[str, str, bytes]]]:
    """(source, language, bytes) of consecutive documents, about READ_BYTES of them at a time."""
    chunk, size = [], 0
    for file in files:
        try:
            for found in _documents(file, unreadable):
                chunk.append(found)
                size += len(found[2])
                if size >= READ_BYTES:
                    yield chunk
                    chunk, size = [], 0
        except OSError:
            unreadable.append(str(file.path))
    if chunk:
        yield chunk


def _documents(file: File, unreadable: list[str]) -> Iterator[tuple[str, str, bytes]]:
    """(source, language or "", bytes) of each document of a file."""
    ending = next((e for e in ENDINGS["jsonl"] if file.path.name.endswith(e)), None)
    if ending is None:
        yield file.source, "", file.path.read_bytes()
        return
    source = file.path.name.removesuffix(ending) if file.source == TOP else file.source
    names = DataConfig()
    fields = Fields(names.text_fields, names.id_fields, names.language_fields)
    for found in read_jsonl(str(file.path), file.path.name, 0, -1, fields):
        if isinstance(found, Document):
            yield source, found.language, found.data
        else:
            unreadable.append(f"{file.path.name}: {found.reason}")


def _ratio(amount: float, of: int) -> float | None:
    return json_number(amount / of if of else math.nan)
