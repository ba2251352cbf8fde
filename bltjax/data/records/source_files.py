"""Notices files of a source that change while records are made of them.

The state of a file is its size in bytes and the time of its last change, as its file system has
them. A file of another size is another file. One of another time alone may be a copy, so what is
recorded of it is compared with what it holds.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from bltjax.data.sources.units import Unit

State = list | None  # [bytes, time of the last change]; None for a file that cannot be found


def states(unit: Unit) -> list[State]:
    """Returns the state of each file of a unit; none for datasets, whose files are not known."""
    if unit.kind == "huggingface":
        return []
    with ThreadPoolExecutor(16) as pool:  # remote files are slow
        remote = any("://" in path for path in unit.paths)
        return list((pool.map if remote else map)(_state, unit.paths))


def _state(path: str) -> State:
    try:
        if "://" in path:
            remote = epath.Path(path).stat()
            return [remote.length, remote.mtime]
        local = os.stat(path)
        return [local.st_size, local.st_mtime_ns]
    except OSError:
        return None


def touched(directory: Path, task, now: list[State]) -> list[str]:
    """Returns the files of a writing.Task whose time has changed; ValueError if a size has."""
    found = []
    for path, was, is_now in zip(task.unit.paths, task.states, now, strict=False):
        if was is None or is_now is None or was[0] != is_now[0]:
            raise changed(directory, task, [path])
        if was != is_now:
            found.append(path)
    return found


def refuse_changed(directory: Path, task, now: list[State]):
    """Raises ValueError where a file of a writing.Task has changed in any way."""
    if paths := touched(directory, task, now):
        raise changed(directory, task, paths)


def changed(directory: Path, task, paths: Sequence[str]) -> ValueError:
    """Returns the error for files that are not what records were begun with."""
    first, *others = [*paths] or [f"part {task.unit.name}"]
    more = f", or one of {len(others)} files beside it," if others else ""
    return ValueError(
        f"{first} of source {task.source.name!r}{more} has changed or gone since the records in "
        f"{str(directory)!r} were begun: put it back as it was, or delete that directory and make "
        "the records anew"
    )
