"""Reads files that others wrote: regular ones only, and JSON of bounded size."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from bltjax.runtime import buckets
from bltjax.runtime.paths import is_remote

MAX_JSON_BYTES = 16 * 2**20  # settings take kilobytes, the index of fifty thousand tensors eight MB

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path):
    """Raises ValueError unless a path is a regular file or a link to one; OSError without any.

    Opening a pipe hangs until somebody writes to it, and a device may never end. In a bucket there
    are files only.
    """
    if is_remote(path):
        return
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"it is {_KINDS.get(kind, 'something else')}, must be a file")


def check_utf8(path: str | os.PathLike):
    """Raises ValueError unless a path has the bytes that libraries in C++ use: those of UTF-8.

    In another locale they would look for another file, or take no such text.
    """
    if str(path).encode("utf-8", "replace") != os.fsencode(path):
        raise ValueError(
            f"the path {path} is not UTF-8 in this locale: set PYTHONUTF8=1, or rename it"
        )


def irregular_files(directory: Path) -> list[str]:
    """Returns a line for each pipe, device and socket below a directory, for other readers."""
    problems = []
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            try:
                check_regular(path)
            except ValueError as error:
                problems.append(f"{path} cannot be read ({error}): remove it")
            except OSError:  # gone meanwhile, or a link to nothing: whoever needs it will tell
                continue
    return problems


def dangling_links(directory: Path, pattern: str) -> list[str]:
    """Returns a line for each link that leads nowhere, of those whose names a regex matches."""
    if is_remote(directory):
        return []
    found = [path for path in directory.iterdir() if re.fullmatch(pattern, path.name)]
    return [
        f"{path.name} is a link to nothing, {os.readlink(path)}: download it again, or remove it"
        for path in sorted(found)
        if path.is_symlink() and not path.exists()
    ]


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Reads a whole regular file. Raises OSError, or ValueError for one that is larger."""
    check_regular(path)
    if is_remote(path):
        content = buckets.read(path)
    else:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        size = len(content) if is_remote(path) else os.stat(path).st_size
        raise ValueError(f"it has {size} bytes, at most {max_bytes} are read")
    return content


def parse_json(text: bytes) -> Any:
    """Parses JSON. Raises ValueError, also for an object with two values of one name."""
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object_without_twins)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object_without_twins(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twins = sorted({name for name, _ in pairs if name in seen or seen.add(name)})
        raise ValueError(f"{', '.join(twins)[:200]} is there twice")
    return found


def reason(error: Exception) -> str:
    """Returns what an error says on one line, without the number of the operating system."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
