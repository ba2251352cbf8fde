"""Files and directories that are whole or not there."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"  # the suffix of what is being written
UNFINISHED = "UNFINISHED"  # a file in a directory that is not whole


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file to write, which becomes `path` when the block ends.

    A process killed meanwhile leaves the old file, or none, and one with the suffix `.partial`.
    """
    partial = path.with_suffix(PARTIAL)
    with partial.open("wb") as file:
        yield file
    os.replace(partial, path)


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends without an error.

    Until then it stands beside the target under a hidden name and holds a file UNFINISHED. An error
    removes it; a process killed meanwhile leaves it, and the next attempt empties it. Raises
    FileExistsError where a target, or something else under the hidden name, is there already, and
    BlockingIOError while another process is filling it.
    """
    _refuse_existing(target)
    partial = target.with_name(f".{target.name}{PARTIAL}")
    if partial.is_symlink() or (partial.exists() and not _was_ours(partial)):
        raise FileExistsError(f"{partial} is in the way: move it, or choose another target")
    missing = [parent for parent in partial.parents if not parent.exists()]
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)  # a killed process lets go of it
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process is writing {target}: wait for it, or choose another target"
            ) from error
        (partial / UNFINISHED).touch()
        for left in partial.iterdir():
            if left.name != UNFINISHED:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
            _refuse_existing(target)
            (partial / UNFINISHED).unlink()
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in missing:
                parent.rmdir()
            raise
    finally:
        os.close(lock)


def _was_ours(partial: Path) -> bool:
    return partial.is_dir() and ((partial / UNFINISHED).exists() or not any(partial.iterdir()))


def _refuse_existing(target: Path):
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists: choose another target, or delete it")
