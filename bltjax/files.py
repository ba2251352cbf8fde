"""Files and directories that are whole or not there."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"  # the suffix of what is being written


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

    An error removes it. A process killed meanwhile leaves it under the suffix `.partial`, which
    the next attempt empties. Raises FileExistsError where there is a target already, and
    BlockingIOError while another process is filling it.
    """
    partial = target.with_name(target.name + PARTIAL)
    _refuse_existing(target)
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)  # a killed process lets go of it
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process is writing {target}: wait for it, or choose another target"
            ) from error
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
            _refuse_existing(target)
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _refuse_existing(target: Path):
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists: choose another target, or delete it")
