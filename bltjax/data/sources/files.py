"""Finds the files of a source, whose path is a file, a directory or a glob, local or remote."""

import itertools
import os
import pathlib
import re
import stat
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.sources.formats import ENDINGS, compression_ending, without_compression
from bltjax.data.sources.left_out import (
    BROKEN,
    ENDING,
    EXCLUDED,
    HIDDEN,
    LINK,
    LeftOut,
    described,
)
from bltjax.runtime.paths import as_path, is_remote

CONVERSATIONS = ("jsonl", "parquet")  # kinds of files of a source of the kind "chat"
COMPLETE = ".complete"  # ending of the marker beside each of Meta's finished files (model.md#files)


class File(NamedTuple):
    """A file of a source."""

    name: str  # relative to the root of the source
    path: str
    kind: str
    size: int  # bytes


class Listing(NamedTuple):
    """The files of a source, unordered, and what is at its path and not of it."""

    files: list[File]
    left_out: list[LeftOut]


def python_library_root() -> Path:
    """Returns the standard library directory of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def find_files(source: SourceConfig, data: DataConfig, lenient: bool = False) -> Listing:
    """Returns the files of a source; see `units.list_units` for rules and errors.

    lenient: a directory that cannot be listed is left out instead of an error, and links count
    wherever they lead.
    """
    location = _location(source)
    given = as_path(location) if is_remote(location) else epath.Path(location)
    search = _Search(source, data, lenient)
    if given.is_dir():
        found = search.walk(location)
    elif given.exists():
        if fault := _fault(location):
            raise ValueError(f"source {source.name!r}: {location!r} is {fault}: give a file")
        found = {location: search.kind_of(location, explicit=True)}
    elif re.search(r"[*?[]", location):
        found = search.glob(location)
    else:
        raise FileNotFoundError(
            f"source {source.name!r}: nothing at {location!r}: give an existing file, directory or "
            "glob"
        )
    names = dict(zip(search.left_out, relative_names(search.left_out, source), strict=True))
    left_out = [
        LeftOut(names[path], path, *why)
        for path, why in sorted(search.left_out.items())
        if path not in found
    ]
    if not found:
        raise _no_file(source, data, location, left_out)
    named = zip(relative_names(found, source), found.items(), strict=True)
    return Listing([File(n, path, kind, _size(path)) for n, (path, kind) in named], left_out)


def _no_file(
    source: SourceConfig, data: DataConfig, location: str, left_out: list[LeftOut]
) -> ValueError:
    facts = "; ".join(described(left_out, source, data)) or "there is no file at all"
    kinds = dict(auto=ENDINGS, chat=CONVERSATIONS)
    wanted = kinds.get(source.kind, [source.kind])
    endings = [ending for kind in wanted for ending in ENDINGS.get(kind, ())]
    endings += source.text_suffixes(data) if source.kind in ("auto", "text", "bytes") else ()
    ends = "" if "" in endings else f" ends in one of {', '.join(endings)}"
    return ValueError(
        f"source {source.name!r} of kind {source.kind!r}: no file below {location!r}"
        f"{ends or ' can be read'}: give another path{', kind or suffixes' * bool(ends)} ({facts})"
    )


def relative_names(paths: Iterable[str], source: SourceConfig) -> Iterator[str]:
    """Yields the names of files relative to the source's directory, or to its glob's root."""
    location = _location(source)
    roots = _below(location, ""), _below(fixed_part(location), "")
    for path in paths:
        directory = path[: path.rfind("/") + 1]
        yield path[len(next(filter(path.startswith, roots), directory)) :]


def _location(source: SourceConfig) -> str:
    path = os.fspath(epath.Path(os.path.expanduser(source.path or python_library_root())))
    path = re.sub(r"(/\*\*)+$", "", path)  # a directory is walked anyhow
    return "." if path == "**" else path


def fixed_part(pattern: str) -> str:
    """Returns the directory in which the first wildcard of a pattern stands."""
    parts = itertools.takewhile(lambda part: not re.search(r"[*?[]", part), pattern.split("/"))
    return "/".join(parts) or ("/" if pattern.startswith("/") else ".")


def _below(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def _fault(path: str) -> str | None:
    """Returns why there is no file to read at a path; None for a regular or a remote file."""
    if "://" in path:
        return None
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "a link that leads nowhere" if os.path.islink(path) else f"gone ({error.strerror})"
    return None if stat.S_ISREG(mode) else "no regular file, but a pipe, a socket or a device"


def _size(path: str) -> int:
    if "://" in path:
        return epath.Path(path).stat().length
    try:
        return os.stat(path).st_size
    except OSError:  # a link that leads nowhere, or a file that is gone
        return 0


class _Search:
    """Finds files below directories. `left_out` collects {path: (rule, detail)} of the others."""

    def __init__(self, source: SourceConfig, data: DataConfig, lenient: bool):
        self.kind, self.exclude, self.lenient = source.kind, data.exclude, lenient
        self.suffixes = tuple(source.text_suffixes(data))
        self.left_out: dict[str, tuple[str, str]] = {}

    def kind_of(self, path: str, explicit: bool) -> str | None:
        """Returns the kind of a file, or None for a file that is not of the source.

        explicit: the file was named by a path or a glob, and not found in a directory.
        """
        is_text = path.endswith(self.suffixes)
        if self.kind != "bytes":
            is_text |= without_compression(path).endswith(self.suffixes)
        if self.kind == "chat":
            endings = {ending: kind for kind in CONVERSATIONS for ending in ENDINGS[kind]}
            kinds = [kind for ending, kind in endings.items() if path.lower().endswith(ending)]
            return kinds[0] if kinds else "jsonl" if explicit else None
        if self.kind != "auto":
            endings = ENDINGS.get(self.kind, ())
            fits = is_text if self.kind in ("text", "bytes") else path.lower().endswith(endings)
            return self.kind if explicit or fits else None
        for known, endings in ENDINGS.items():
            if path.lower().endswith(endings):
                return known
        return "text" if explicit or is_text else None

    def walk(self, root: str) -> dict[str, str]:
        """Returns the kind of each file below a directory, but of hidden ones and some links."""
        found, links, pending = {}, {}, [root]
        while pending:
            directory = pending.pop()
            # One directory at a time: remote file systems do not report errors further down.
            for _, inner, names in epath.Path(directory).walk(on_error=self._unlisted):
                for name in sorted(inner):
                    path = _below(directory, name)
                    if self._may_enter(path, name):
                        pending.append(path)
                for name in names:
                    path = _below(directory, name)
                    if kind := self._admitted(path, name):
                        (links if os.path.islink(path) else found)[path] = kind
                break
        return found | self._links(root, found, links)

    def _unlisted(self, error: OSError):
        if not self.lenient:
            raise type(error)(f"{error.filename} cannot be listed: {error.strerror}") from error
        self.left_out[error.filename] = BROKEN, f"cannot be listed ({error.strerror})"

    def _may_enter(self, path: str, name: str) -> bool:
        if name[:1] == "." or name in self.exclude:
            self.left_out[path] = (HIDDEN, "") if name[:1] == "." else (EXCLUDED, name)
        elif os.path.islink(path):
            self.left_out[path] = LINK, "a link to a directory"
        else:
            return True
        return False

    def _admitted(self, path: str, name: str) -> str | None:
        """Returns the kind of a file in a directory; None where it is left out."""
        kind = self.kind_of(path, explicit=False)
        if name.endswith(COMPLETE):
            return None
        if name[:1] == ".":
            self.left_out[path] = HIDDEN, ""
        elif kind is None:
            inner = without_compression(name)
            ending = os.path.splitext(inner)[1] + compression_ending(name)
            self.left_out[path] = ENDING, ending
        elif fault := _fault(path):
            self.left_out[path] = BROKEN, fault
        else:
            return kind
        return None

    def _links(self, root: str, found: Collection[str], links: dict[str, str]) -> dict[str, str]:
        """Returns those of the links that lead to files which are not read otherwise.

        So no text is read twice, under two names.
        """
        taken, resolved = {}, os.path.realpath(root)
        seen = {_below(resolved, path[len(_below(root, "")) :]) for path in found} if links else ()
        for path in sorted(links, key=lambda path: path.split("/")):
            target = os.path.realpath(path)
            if not self.lenient and not target.startswith(_below(resolved, "")):
                self.left_out[path] = LINK, "a link that leads elsewhere"
            elif target in seen:
                self.left_out[path] = LINK, "a link to a file that is read already"
            else:
                taken[path] = links[path]
                seen.add(target)
        return taken

    def glob(self, pattern: str) -> dict[str, str]:
        """Returns the kind of each file that matches, or is below a directory that matches."""
        if "://" in pattern and "**" in pattern:
            raise ValueError(
                f"{pattern!r}: ** is for local paths; give the directory, which is walked, or use *"
            )
        root = fixed_part(pattern)
        base = epath.Path(root) if "://" in pattern else pathlib.Path(root)
        found = {}
        for path in sorted(base.glob(pattern.removeprefix(_below(root, "")))):
            *parents, last = path.relative_to(base).as_posix().split("/")
            below = _below(root, "/".join([*parents, last]))
            is_directory = path.is_dir()
            names = [*parents, last] if is_directory else parents
            excluded = next((name for name in names if name in self.exclude), None)
            if any(name.startswith(".") for name in [*parents, last]):
                rule = HIDDEN, ""
            elif excluded:
                rule = EXCLUDED, excluded
            elif is_directory:
                found = self.walk(below) | found
                continue
            elif fault := _fault(below):
                rule = BROKEN, fault
            else:
                if not last.endswith(COMPLETE):
                    found[below] = self.kind_of(below, explicit=True)
                continue
            self.left_out[below] = rule
        # Once each, also where links lead to the same file, and by its own name if that is found.
        inside = _below(os.path.realpath(root), "")
        own = {path: inside + path[len(_below(root, "")) :] for path in found}
        last = sorted(found, key=lambda path: (own[path] != os.path.realpath(path), path))[::-1]
        once = {os.path.realpath(path): path for path in last}
        for path in found.keys() - once.values():
            self.left_out[path] = LINK, "a link to a file that is read already"
        return {path: found[path] for path in once.values()}
