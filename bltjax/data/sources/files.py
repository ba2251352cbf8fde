"""Finds the files of a source, whose path is a file, a directory or a glob, local or remote."""

import functools
import itertools
import os
import pathlib
import re
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.sources.readers import COMPRESSED

ENDINGS = {
    "jsonl": (
        ".jsonl",
        ".ndjson",
        *(lines + c for lines in (".jsonl", ".ndjson", ".json") for c in COMPRESSED),
    ),
    "parquet": (".parquet",),
    "array_record": (".array_record", ".arrayrecord"),
    "arrow": (".arrow",),
}
COMPLETE = ".complete"  # ending of the marker beside each of Meta's finished files (model.md#files)


class File(NamedTuple):
    """A file of a source."""

    name: str  # relative to the root of the source
    path: str
    kind: str
    size: int  # bytes


def python_library_root() -> Path:
    """Returns the standard library directory of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def find_files(source: SourceConfig, data: DataConfig) -> list[File]:
    """Returns the files of a source, unordered; see `units.list_units` for rules and errors."""
    location = _location(source)
    given = epath.Path(location)
    kind_of = functools.partial(_kind, kind=source.kind, suffixes=data.suffixes)
    if given.is_dir():
        kinds = _walk(location, data.exclude, kind_of)
    elif given.exists():
        kinds = {location: kind_of(location, explicit=True)}
    elif re.search(r"[*?[]", location):
        kinds = _glob(location, data.exclude, kind_of)
    else:
        raise FileNotFoundError(
            f"source {source.name!r}: nothing at {location!r}: give an existing file, directory or "
            "glob"
        )
    if not kinds:
        wanted = ENDINGS if source.kind == "auto" else [source.kind]
        endings = [ending for kind in wanted for ending in ENDINGS.get(kind, ())]
        endings += data.suffixes if source.kind in ("auto", "text") else ()
        raise ValueError(
            f"source {source.name!r} of kind {source.kind!r}: no file below {location!r} ends in "
            f"one of {', '.join(endings)}: give another path or kind, or other suffixes (hidden "
            f"files are left out, links that lead elsewhere, and directories named {data.exclude})"
        )
    names = zip(relative_names(kinds, source), kinds.items(), strict=True)
    return [File(name, path, kind, _size(path)) for name, (path, kind) in names]


def relative_names(paths: Iterable[str], source: SourceConfig) -> Iterator[str]:
    """Yields the names of files relative to the source's directory, or to its glob's root."""
    location = _location(source)
    roots = _below(location, ""), _below(_fixed(location), "")
    for path in paths:
        directory = path[: path.rfind("/") + 1]
        yield path[len(next(filter(path.startswith, roots), directory)) :]


def _location(source: SourceConfig) -> str:
    path = os.fspath(epath.Path(os.path.expanduser(source.path or python_library_root())))
    return re.sub(r"(/\*\*)+$", "", path)  # a directory is walked anyhow


def _fixed(pattern: str) -> str:
    """Returns the directory in which the first wildcard of a pattern stands."""
    parts = itertools.takewhile(lambda part: not re.search(r"[*?[]", part), pattern.split("/"))
    return "/".join(parts) or ("/" if pattern.startswith("/") else ".")


def _below(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def _kind(path: str, explicit: bool, kind: str, suffixes: tuple[str, ...]) -> str | None:
    """Returns the kind of a file, or None for a file that is not of the source.

    explicit: the file was named by a path or a glob, and not found in a directory.
    """
    if kind != "auto":
        endings = tuple(suffixes) if kind == "text" else ENDINGS[kind]
        return kind if explicit or path.endswith(endings) else None
    for known, endings in ENDINGS.items():
        if path.endswith(endings):
            return known
    return "text" if explicit or path.endswith(tuple(suffixes)) else None


def _size(path: str) -> int:
    return epath.Path(path).stat().length if "://" in path else os.stat(path).st_size


def _walk(root: str, exclude: Collection[str], kind_of) -> dict[str, str]:
    """Returns the kind of each file below a directory, but of hidden ones and links elsewhere."""
    found, links, pending = {}, {}, [root]
    while pending:
        directory = pending.pop()
        # One directory at a time, since remote file systems do not report errors further down.
        _, directories, names = next(epath.Path(directory).walk(on_error=_raise))
        inner = [name for name in directories if name not in exclude and name[0] != "."]
        paths = [_below(directory, name) for name in inner]
        pending += [path for path in paths if not os.path.islink(path)]
        for path in (_below(directory, name) for name in names if name[:1] != "."):
            if kind := kind_of(path, explicit=False):
                (links if os.path.islink(path) else found)[path] = kind
    if links:
        # Files before the links to them, so that a text is never read twice, under two names.
        resolved = os.path.realpath(root)
        seen = {_below(resolved, path[len(_below(root, "")) :]) for path in found}
        for path in sorted(links, key=lambda path: path.split("/")):
            target = os.path.realpath(path)
            inside = target.startswith(_below(resolved, ""))
            if inside and target not in seen and not os.path.isdir(target):
                found[path] = links[path]
                seen.add(target)
    return found


def _glob(pattern: str, exclude: Collection[str], kind_of) -> dict[str, str]:
    """Returns the kind of each file that matches, or is below a directory that matches."""
    if "://" in pattern and "**" in pattern:
        raise ValueError(
            f"{pattern!r}: ** is for local paths; give the directory, which is walked, or use *"
        )
    root = _fixed(pattern)
    base = epath.Path(root) if "://" in pattern else pathlib.Path(root)
    found = {}
    for path in sorted(base.glob(pattern.removeprefix(_below(root, "")))):
        name = path.relative_to(base).as_posix()
        *parents, last = name.split("/")
        if "/." in f"/{name}" or any(parent in exclude for parent in parents):
            continue
        below = _below(root, name)
        if not path.is_dir():
            found[below] = kind_of(below, explicit=True)
        elif last not in exclude:
            found = _walk(below, exclude, kind_of) | found
    # Once each, also where links lead to the same file.
    once = {os.path.realpath(path): path for path in sorted(found, reverse=True)}
    return {path: found[path] for path in once.values() if not path.endswith(COMPLETE)}


def _raise(error: OSError) -> None:
    raise error
