"""Files and directories that are whole or not there."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

Task = TypeVar("Task")

PARTIAL = ".partial"  # the suffix of what is being written
LOCK = ".lock"
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


@contextlib.contextmanager
def alone(directory: Path):
    """Keeps other processes that ask for the same directory waiting until the block ends."""
    # A file, since on NFS the lock of a directory does not reach other machines.
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT)  # a killed process lets go of it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def share(
    tasks: Iterable[Task],
    is_done: Callable[[Task], bool],
    do: Callable[[Task], None],
    lock: Callable[[Task], Path],
    poll_seconds: float = 0.5,
):
    """Returns when all tasks are done, by this process or by others that share the same tasks.

    Every process goes through the tasks in order and takes those that are not done and whose lock
    file nobody holds; then it waits for the others. A process that dies lets go of its lock, and
    one of the others takes the task over, so `do` must cope with what was left. What `do` raises
    comes through. Lock files stay. Processes on several machines need a file system whose `flock`
    reaches all of them: NFS does, a bucket mounted with gcsfuse does not.
    """
    left = list(tasks)
    while left:
        held = [task for task in left if not _do_alone(task, is_done, do, lock(task))]
        if len(held) == len(left):
            time.sleep(poll_seconds)
        left = held


def _do_alone(task: Task, is_done, do, lock: Path) -> bool:
    """Returns whether the task is done; False while another process holds its lock."""
    if is_done(task):
        return True
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            if not is_done(task):  # It may have been done since we asked.
                do(task)
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # Forked children hold the file open, too.
        return True
    finally:
        os.close(file)


def _was_ours(partial: Path) -> bool:
    return partial.is_dir() and ((partial / UNFINISHED).exists() or not any(partial.iterdir()))


def _refuse_existing(target: Path):
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists: choose another target, or delete it")
