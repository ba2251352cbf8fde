"""Atomic writes of files and directories, and locks between processes.

Locks are files that `flock` locks: a process that is killed lets go of them, and on NFS they reach
other machines. A bucket that is mounted with gcsfuse has none; below gs:// they are leases.
"""

import contextlib
import errno
import io
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from bltjax.runtime import buckets, leases, signals
from bltjax.runtime.paths import is_remote, make_directory
from bltjax.runtime.system_errors import writing

Task = TypeVar("Task")

PARTIAL = ".partial"  # the suffix of files that are being written
LOCK = ".lock"
OWNER = ".owner.lock"  # in a directory that one process keeps for itself; says which
UNFINISHED = "UNFINISHED"  # a file in a directory that is being filled, locked by its process


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a binary file to write, which becomes `path` when the block ends.

    A process killed meanwhile leaves the old file, or none, and one with the suffix `.partial`; an
    error leaves the old file alone. In a bucket the whole file is in memory until it is sent.
    """
    if is_remote(path):
        content = io.BytesIO()
        yield content
        buckets.write(path, content.getvalue())
        return
    partial = path.with_suffix(PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, value: dict):
    """Writes a JSON file atomically; its directory is made if need be.

    Raises UnwritableError, which names the file and the remedy.
    """
    with writing(path):
        make_directory(path.parent)
        with replacing(path) as file:
            file.write(json.dumps(value, indent=1).encode())


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields a directory to fill, which becomes `target` when the block ends without an error.

    Until then it stands beside the target under a hidden name and holds a file UNFINISHED. An error
    removes it; a process killed meanwhile leaves it, and the next attempt empties it. Raises
    FileExistsError where a target, or something else under the hidden name, is there already, and
    BlockingIOError while another process is filling it. In a bucket it is filled on the local disk,
    and sent when the block ends; until all of it has arrived there is an object UNFINISHED.
    """
    if is_remote(target):
        with _new_remote_directory(target) as partial:
            yield partial
        return
    refuse_existing(target)
    partial = target.with_name(f".{target.name}{PARTIAL}")
    if partial.is_symlink() or (partial.exists() and not _was_ours(partial)):
        raise FileExistsError(f"{partial} is in the way: move it, or choose another target")
    missing = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _held(partial / UNFINISHED)
    except BaseException:
        _remove_empty(partial, *missing)
        raise
    if lock is None:
        raise BlockingIOError(
            f"another process is writing {target}: wait for it, or choose another target"
        )
    with lock, signals.undoing(lambda: _remove_begun(partial, missing)):
        try:
            _empty(partial)
            yield partial
            refuse_existing(target)
            (partial / UNFINISHED).unlink()
            os.rename(partial, target)
        except BaseException:
            _remove_begun(partial, missing)
            raise


@contextlib.contextmanager
def _new_remote_directory(target: Path) -> Iterator[Path]:
    refuse_existing(target)
    lease = leases.attempt_patiently(target / UNFINISHED)
    if lease is None:
        raise BlockingIOError(
            f"another process is writing {target}: wait for it, or choose another target"
        )
    with lease, tempfile.TemporaryDirectory(prefix="bltjax-") as scratch:
        _empty_remote(target)
        partial = Path(scratch) / target.name
        partial.mkdir()
        try:
            yield partial
            buckets.upload_below(partial, target)
        except BaseException:
            _empty_remote(target)
            raise


def refuse_existing(target: Path):
    """Raises FileExistsError where `new_directory` finds something that it did not leave."""
    if is_remote(target):
        there = buckets.below(target)
        exists = there and UNFINISHED not in there
    else:
        exists = target.exists() or target.is_symlink()
    if exists:
        raise FileExistsError(f"{target} exists: choose another target, or delete it")


def _empty_remote(target: Path):
    """Deletes all but the object that says that a directory is being filled."""
    for name in buckets.below(target).keys() - {UNFINISHED}:
        buckets.delete(target / name)


@contextlib.contextmanager
def alone(directory: Path):
    """Waits for other processes that ask for the same directory, and has them wait for the block.

    Raises UnwritableError where there is no such directory, or nothing can be written into it.
    """
    with writing(directory):
        if is_remote(directory):
            lock = leases.wait_for(directory / LOCK)
        else:
            _must_exist(directory)
            lock = FileLock(directory / LOCK, fallback_to_soft=False).acquire()
    with lock:
        yield


@contextlib.contextmanager
def owning(directory: Path):
    """Keeps a directory for this process until the block ends; a process that dies lets go of it.

    Raises BlockingIOError, which names host and process, while another process keeps it.
    """
    path = directory / OWNER
    if is_remote(directory):
        if (lease := leases.attempt_patiently(path)) is None:
            raise BlockingIOError(_in_use(directory, leases.owner(path)))
        with lease:
            yield
        return
    with writing(directory):
        _must_exist(directory)
        lock = _held(path)
    if lock is None:
        raise BlockingIOError(_in_use(directory, _owner(directory)))
    with lock:
        with writing(path):
            path.write_text(json.dumps(dict(host=socket.gethostname(), pid=os.getpid())))
        yield


def place_of(path: Path) -> tuple[int, int] | None:
    """Returns numbers that tell whether a path still leads to the same place; None: to nothing.

    A path in a bucket always does.
    """
    if is_remote(path):
        return 0, 0
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def free_name(path: Path) -> Path:
    """Returns the path, or one with a number after it where that is taken."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _must_exist(directory: Path):
    if not directory.is_dir():  # a lock in it would make it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _owner(directory: Path) -> dict:
    try:
        owner = json.loads((directory / OWNER).read_text())
    except (OSError, ValueError):  # it has only just begun
        return {}
    return owner if isinstance(owner, dict) else {}


def _in_use(directory: Path, owner: dict) -> str:
    host, pid = owner.get("host"), owner.get("pid")
    if host is None or pid is None:
        return f"{directory} is in use by another process: wait for it to end, or stop it"
    gone = f" (if {host} is gone for good: delete {directory / OWNER})"
    elsewhere = host != socket.gethostname() and not is_remote(directory)
    return (
        f"{directory} is in use by process {pid} on {host}: wait for it to end, or stop it"
        f"{gone if elsewhere else ''}"
    )


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
    one of the others takes the task over, so `do` must cope with a part of it being done. Errors of
    `do` come through. Lock files stay.
    """
    left = list(tasks)
    while left:
        held = [task for task in left if not _do_alone(task, is_done, do, lock(task))]
        if len(held) == len(left):
            time.sleep(poll_seconds)
        left = held


def _do_alone(task: Task, is_done, do, path: Path) -> bool:
    """Returns whether the task is done; False while another process holds its lock."""
    if is_done(task):
        return True
    with writing(path):
        make_directory(path.parent)
        lock = _held(path)
    if lock is None:
        return False
    with lock:
        if not is_done(task):  # It may have been done since we asked.
            do(task)
    return True


def _held(path: Path):
    """Returns a context that lets go of the lock at its end; None where another process has it."""
    if is_remote(path):
        return leases.attempt(path)
    try:
        return FileLock(path, fallback_to_soft=False).acquire(blocking=False)
    except Timeout:
        return None


def _empty(partial: Path):
    """Removes all but the file that says that a directory is being filled."""
    for left in partial.iterdir():
        if left.name != UNFINISHED:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _remove(partial: Path, patience_seconds: float = 5.0):
    """Removes a directory that threads of what was interrupted may still write, or make again."""
    deadline = time.monotonic() + patience_seconds
    while partial.exists() and time.monotonic() < deadline:
        try:
            _empty(partial)
            (partial / UNFINISHED).unlink(missing_ok=True)
            partial.rmdir()
        except OSError:
            with contextlib.suppress(OSError):
                (partial / UNFINISHED).touch()  # so that the next attempt may empty it
        time.sleep(0.1)


def _remove_begun(partial: Path, missing: list[Path]):
    _remove(partial)
    _remove_empty(*missing)


def _remove_empty(*directories: Path):
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()


def _was_ours(partial: Path) -> bool:
    return partial.is_dir() and ((partial / UNFINISHED).exists() or not any(partial.iterdir()))
