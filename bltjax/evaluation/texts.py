"""Finds and reads the documents that commands measure: those of a file, a folder or a glob.

They are read as for training (`bltjax/data/sources/units.py`), but files of any ending count, in
directories of any name, and links wherever they lead.
"""

import collections
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.sources import units
from bltjax.data.sources.files import File, fixed_part
from bltjax.data.sources.formats import HEAD, codec_of
from bltjax.data.sources.left_out import BROKEN, LeftOut, described
from bltjax.data.sources.readers import Bad, Document, text_of
from bltjax.runtime.terminal import printable_name

_DATA = DataConfig(suffixes=("",), exclude=())
_SHOWN = 10  # reasons on stderr


class TextOfSource(NamedTuple):
    """A document: the source it counts for, its language ("" where unknown) and its bytes."""

    source: str
    language: str
    data: bytes


class Texts(NamedTuple):
    """Files to read, by the source that they count for, and how much of each source is read."""

    path: str
    files: list[File]  # sorted by source and name
    sources: list[str]  # of the files
    settings: SourceConfig
    share: int | None  # bytes of each source at most; None: all
    left_out: list[LeftOut]

    def num_bytes(self) -> int:
        """Returns the bytes to read, about: compressed files hold more."""
        size = sum(file.size for file in self.files)
        return size if self.share is None else min(size, self.share * len(set(self.sources)))

    def is_one_text(self) -> bool:
        """Returns whether all there is is one file, which is one document."""
        return len(self.files) == 1 and self.files[0].kind in ("text", "bytes")

    def without_text(self, bad: Sequence[Bad]) -> ValueError:
        """Returns the error for texts of which nothing was read but `bad`."""
        if bad:
            return ValueError(units.no_document(bad, repr(self.path)))
        return ValueError(f"the files at {self.path!r} hold no bytes: choose another path")


def find_texts(
    path: str | os.PathLike,
    *,
    kind: str = "auto",
    field: str = "",
    max_bytes: int | None = None,
    files_apart: bool = False,
) -> Texts:
    """Returns the files at a path, a file, directory or glob, and the sources that they are of.

    A directory below the path is a source, and so is each file of records beside it. Other files
    there are one source together, named like the folder, or with files_apart a source each. A file
    of records gives its name without the ending, or with it where another source has that name.
    kind, field: see SourceConfig. max_bytes: of all documents together, in equal parts for the
    sources. Raises FileNotFoundError where there is nothing, ValueError where nothing can be read.
    """
    path = os.path.expanduser(os.fspath(path))
    if not path:  # in the settings of a run, the path of the standard library
        raise ValueError("the path of the texts is empty: give a file, a directory or a glob")
    settings = SourceConfig("data", path, kind, field)
    files, left_out = units.list_files(settings, _DATA, lenient=True)
    names = _sources(files, path, files_apart)
    files.sort(key=lambda file: (names[file.path], file.name.split("/")))
    count, share = len(set(names.values())), None
    if max_bytes is not None:
        share = max_bytes // count
        if not share:
            raise ValueError(
                f"--max_bytes={max_bytes} is less than a byte for each of {count} sources: give at "
                f"least {count}"
            )
    return Texts(path, files, [names[file.path] for file in files], settings, share, left_out)


def _sources(files: Sequence[File], path: str, apart: bool) -> dict[str, str]:
    """Returns the source of each file, by its path; no two sources have the same name."""
    if len(files) == 1 and not os.path.isdir(path):
        return {files[0].path: files[0].name.partition("/")[0]}
    tops = {file.path: file.name.partition("/")[0] for file in files}
    beside = [file for file in files if "/" not in file.name]
    texts = {file.path for file in beside if file.kind in ("text", "bytes")}
    records = {file.path: _stem(file.name) for file in beside if file.path not in texts}
    if not apart:
        others = {top for file, top in tops.items() if file not in texts}
        tops |= dict.fromkeys(texts, _folder(path, others))
    taken = collections.Counter(records.values())
    taken.update({name for file, name in tops.items() if file not in records})
    return tops | {file: stem for file, stem in records.items() if taken[stem] == 1}


def _stem(name: str) -> str:
    """Returns the name of a file of records without its ending."""
    return re.sub(r"\.(ndjson|jsonl?|parquet|arrow|array_?record)(\.\w+)?$", "", name)


def _folder(path: str, others: set[str]) -> str:
    """Returns the name of the folder at a path or a glob, unlike those of its subfolders."""
    directory = path if os.path.isdir(path) else fixed_part(path)
    name = Path(directory).resolve().name or "/"
    while name in others:
        name = f"./{name}"
    return name


def read_texts(texts: Texts, bad: list[Bad]) -> Iterator[TextOfSource]:
    """Yields documents, source by source; what cannot be read is added to `bad`.

    Where a source gives its share only, its first documents do, and the last one is cut.
    """
    named = zip(texts.sources, texts.files, strict=True)
    for source, files in itertools.groupby(named, key=lambda pair: pair[0]):
        left = texts.share
        for _, file in files:
            for document in _documents(file, texts.settings, left, bad):
                data = document.data[:left]
                yield TextOfSource(source, document.language, data)
                left = None if left is None else left - len(data)
                if left == 0:
                    break
            if left == 0:
                break


def _documents(
    file: File, settings: SourceConfig, limit: int | None, bad: list[Bad]
) -> Iterator[Document]:
    try:
        for found in units.read_file(file, settings, _DATA, limit=limit):
            if isinstance(found, Bad):
                bad.append(found)
            else:
                yield found
    except OSError as error:
        bad.append(Bad(file.name, str(error)))


def read_input(texts: Texts, bad: list[Bad]) -> list[bytes]:
    """Returns the bytes of all documents; ValueError where all there is cannot be read."""
    documents = [document.data for document in read_texts(texts, bad)]
    if bad and not documents:
        raise texts.without_text(bad)
    return documents


def read_stdin(kind: str, limit: int | None, bad: list[Bad]) -> bytes:
    """Returns the text on standard input, decompressed if need be, or its first `limit` bytes.

    Damage is added to `bad`. Raises ValueError where nothing can be read, unless kind is "bytes".
    """
    if kind not in ("auto", "text", "bytes"):
        raise ValueError(f"--kind={kind} is for files: standard input is one text, or bytes")
    head = sys.stdin.buffer.read(HEAD)
    if limit is None or (codec_of(head) and kind != "bytes"):
        data = head + sys.stdin.buffer.read()
    else:
        data = head + sys.stdin.buffer.read(max(limit - len(head), 0))
    if kind == "bytes":
        return data[:limit]
    found = list(text_of(io.BytesIO(data), "standard input", limit))
    bad += [record for record in found if isinstance(record, Bad)]
    if not isinstance(found[0], Document):
        raise ValueError(f"{bad[-1].name}: {bad[-1].reason}")
    return found[0].data


def unreadable(texts: Texts | None, bad: Sequence[Bad]) -> dict[str, list[str]]:
    """Returns what was not read, for the last line of a command: unreadable, left_out.

    texts: None for standard input.
    """
    left_out = texts.left_out if texts else []
    broken = [f"{file.name}: {file.detail}" for file in left_out if file.rule == BROKEN]
    others = [file for file in left_out if file.rule != BROKEN]
    sentences = described(others, texts.settings, _DATA) if texts else []
    return dict(unreadable=broken + units.grouped(bad), left_out=sentences)


def told(texts: Texts | None, bad: Sequence[Bad]):
    """Prints on stderr what was not read, and on stdout how much of each source was."""
    found = unreadable(texts, bad)
    if texts and texts.share is not None:
        print(f"\nat most {texts.share} bytes of each source were read, its first (--max_bytes)")
    if lines := found["unreadable"]:
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        shown = "; ".join(map(printable_name, lines[:_SHOWN]))
        print(f"could not be read: {shown}{more}", file=sys.stderr)
    for line in found["left_out"]:
        print(printable_name(line), file=sys.stderr)
