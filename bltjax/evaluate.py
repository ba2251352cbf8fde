"""Bits per byte of a model on files: `python -m bltjax.evaluate --checkpoint=DIR --data=PATH`.

PATH is a file, or a directory of which every file that is not hidden is a document. Its top-level
directories are the sources that are told apart. Prints a table, with xz for scale, and all of it
as JSON in the last line.
"""

import json
import lzma
import math
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from bltjax import command
from bltjax.command import json_number, printable
from bltjax.progress import Progress

READ_BYTES = 16_000_000  # of files in memory at a time
TOP = "."  # the source of files directly in the directory
_COLUMNS = ("files", "bytes", "bits/byte", "bytes/patch", "xz")


class File(NamedTuple):
    source: str
    path: Path
    num_bytes: int


class Sums:
    """What has been measured of a source."""

    def __init__(self):
        self.files = self.num_bytes = self.num_patches = self.xz_bytes = 0
        self.nats = []
        self._xz = None

    def add(self, data: bytes, score):
        self._xz = self._xz or lzma.LZMACompressor(preset=9)
        self.files += 1
        self.num_bytes += score.num_bytes
        self.num_patches += score.num_patches
        self.nats.append(score.nats)
        self.xz_bytes += len(self._xz.compress(data))

    def close(self):
        """Ends the compression: its dictionary is large, and no second one should be alive."""
        self.xz_bytes += len(self._xz.flush())
        self._xz = None

    def report(self) -> dict:
        """Patches are those of BOS + bytes + EOS, and so is their mean."""
        nats, positions = math.fsum(self.nats), self.num_bytes + 2 * self.files
        return dict(
            files=self.files,
            num_bytes=self.num_bytes,
            nats=nats,
            bits_per_byte=_ratio(nats / math.log(2), self.num_bytes),
            mean_patch_bytes=_ratio(positions, self.num_patches),
            xz_bits_per_byte=_ratio(8 * self.xz_bytes, self.num_bytes),
        )


def evaluate(model, path: str | Path, max_bytes: int | None = None, **options) -> dict:
    """Scores the files at `path`, prints a table of their sources, and returns it.

    options: those of `model.score`. With `max_bytes` files are left out from the first one that
    would take the total above it; none is cut. xz is run over the concatenated bytes of each
    source. Files that cannot be read are left out, and named in `unreadable`. Raises
    FileNotFoundError without `path` and ValueError where no file is left.
    """
    path, unreadable = Path(path), []
    files = list(_within(list_files(path, unreadable), max_bytes))
    if not files:
        raise ValueError(
            f"no file can be read at {str(path)!r} within max_bytes={max_bytes} "
            f"({len(unreadable)} unreadable; hidden files are left out): choose another path"
        )
    progress = Progress("evaluating", sum(file.num_bytes for file in files))
    sums = measure(model, files, unreadable, dict(options, advance=progress))
    progress.close()
    sources = {name: s.report() for name, s in sums.items()}
    result = dict(sources=sources, **total(sums).report(), unreadable=unreadable)
    print_table(result)
    return result


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


def measure(model, files: list[File], unreadable: list[str], options: dict) -> dict[str, Sums]:
    """Sums of each source, in order. The files of a source follow each other."""
    sums = {}
    for chunk in _contents(files, unreadable):
        scores = model.score([data for _, data in chunk], **options)
        for (source, data), score in zip(chunk, scores, strict=True):
            if source not in sums:
                if sums:
                    sums[next(reversed(sums))].close()
                sums[source] = Sums()
            sums[source].add(data, score)
    if sums:
        sums[next(reversed(sums))].close()
    return sums


def total(sums: dict[str, Sums]) -> Sums:
    """All sources together; their xz sizes are added."""
    result = Sums()
    for s in sums.values():
        for name in ("files", "num_bytes", "num_patches", "xz_bytes", "nats"):
            setattr(result, name, getattr(result, name) + getattr(s, name))
    return result


def print_table(result: dict):
    rows = dict(result["sources"])
    if len(rows) > 1:
        rows["all"] = result
    names = {name: printable(name) for name in rows}
    width = max(map(len, ["source", *names.values()]))
    print(f"{'source':{width}}" + "".join(f"{column:>13}" for column in _COLUMNS))
    for name, row in rows.items():
        measured = (row["bits_per_byte"], row["mean_patch_bytes"], row["xz_bits_per_byte"])
        cells = [row["files"], row["num_bytes"]]
        cells += ["-" if x is None else f"{x:.4f}" for x in measured]
        print(f"{names[name]:{width}}" + "".join(f"{cell:>13}" for cell in cells))
    if result["unreadable"]:
        shown = ", ".join(map(printable, result["unreadable"]))
        print(f"{len(result['unreadable'])} could not be read: {shown}", file=sys.stderr)


def main(argv):
    if len(argv) > 1:
        command.fail(f"unexpected argument {argv[1]!r}: give --checkpoint and --data")
    chosen = flags.FLAGS
    if None in (chosen.checkpoint, chosen.data):
        command.fail("give --checkpoint=DIR and --data=PATH")
    sys.stdout.reconfigure(errors="backslashreplace")
    options = {} if chosen.row_bytes is None else dict(row_bytes=chosen.row_bytes)
    try:
        Path(chosen.data).stat()  # a wrong path shows before the model is loaded
        result = evaluate(command.open_model(), chosen.data, chosen.max_bytes, **options)
    except (ValueError, KeyError, OSError) as error:
        command.fail(error)
    print(json.dumps(result))


def _within(files: list[File], max_bytes: int | None) -> Iterator[File]:
    num_bytes = 0
    for file in files:
        num_bytes += file.num_bytes
        if max_bytes is not None and num_bytes > max_bytes:
            return
        yield file


def _contents(files: list[File], unreadable: list[str]) -> Iterator[list[tuple[str, bytes]]]:
    """(source, bytes) of consecutive files, about READ_BYTES of them at a time."""
    chunk, size = [], 0
    for file in files:
        try:
            data = file.path.read_bytes()
        except OSError:
            unreadable.append(str(file.path))
            continue
        chunk.append((file.source, data))
        size += len(data)
        if size >= READ_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _ratio(amount: float, of: int) -> float | None:
    return json_number(amount / of if of else math.nan)


def _define_flags():
    command.define_model_flags()
    flags.adopt_module_key_flags(command)  # shown by --help
    flags.DEFINE_string("data", None, "A file, or a directory of files.")
    flags.DEFINE_integer("max_bytes", None, "Read no more than this; files are not cut.", 0)
    flags.DEFINE_integer("row_bytes", None, "Bytes that the model sees at a time.", 8)


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=command.parse)
