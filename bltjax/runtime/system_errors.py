"""Errors of the operating system in one line: the path, what is wrong with it, and the remedy."""

import contextlib
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from bltjax.runtime import buckets

PATH_WIDTH = 300  # of a path that is shown
OF_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # no reader gets these
OF_DAMAGED_FILES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
TENSORSTORE = (  # how its messages begin
    "RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED"
)
NETWORK_LIBRARIES = ("aiohttp", "gcsfs", "google", "requests", "urllib3")

ALLOW = "make the directory writable"
MOVE_FILE = "move the file that is in the way"
MOVE_DIRECTORY = "move the directory that is in the way"

# What is wrong with a path, what helps, and what does where a run writes, if that is another thing.
FAULTS = {
    errno.ENOENT: ("is not there", "check the path", "put the directory back"),
    errno.EACCES: ("may not be used", "change its permissions, or choose another path", ALLOW),
    errno.EPERM: ("may not be changed", "change its permissions, or choose another path", ALLOW),
    errno.EISDIR: ("is a directory", "give a file", MOVE_DIRECTORY),
    errno.ENOTDIR: ("leads through a file that is no directory", "check the path", MOVE_FILE),
    errno.EEXIST: ("exists", "choose another path, or delete it", MOVE_FILE),
    errno.ENOTEMPTY: (
        "is a directory with files in it",
        "choose another path, or empty it",
        MOVE_DIRECTORY,
    ),
    errno.ENOSPC: ("cannot be written, no space is left there", "free some disk space"),
    errno.EDQUOT: ("cannot be written, the quota is used up", "free some disk space"),
    errno.EFBIG: ("cannot be written, the file is too large", "raise the limit (ulimit -f)"),
    errno.EROFS: ("is on a file system that is read only", "choose another path", ALLOW),
    errno.ENAMETOOLONG: ("is too long a name", "choose a shorter path"),
    errno.ELOOP: ("is a link that leads back to itself", "check the path"),
    errno.EMFILE: ("cannot be opened, too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("cannot be opened, too many files are open on this machine", ""),
    errno.ENXIO: ("is a device that is not there, or a pipe that nobody reads", ""),
    errno.EIO: ("cannot be read or written, the disk reports an error", "see to the disk"),
    errno.ESTALE: ("is on a network disk that was unmounted", "mount it again"),
    errno.ENOMEM: ("cannot be opened, no memory is left", ""),
    errno.EBADF: ("is closed", ""),
}


class UnwritableError(OSError):
    """Raised where the disk refuses a write; the message names the file and the remedy."""


def in_words(error: BaseException, name: str | None = None) -> str:
    """Returns an error of the system as a path, what is wrong with it, and a remedy.

    name: stands for the path of an error that has none. Other errors keep their message, but for
    the numbers of errors of the system inside it.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return without_numbers(str(error))
    path = error.filename if error.filename is not None else name
    paths = [shown(p) for p in (path, error.filename2) if p is not None]
    reason = (error.strerror or os.strerror(error.errno)).rstrip(".")
    # A library may put a sentence of its own into the place of the system's.
    if error.errno not in FAULTS or reason != os.strerror(error.errno):
        return f"{' and '.join(paths)}: {without_numbers(reason)}" if paths else reason
    if not paths:  # only standard input can be closed, see endings.py
        paths = ["standard input" if error.errno == errno.EBADF else "a file"]
    wrong, remedy = FAULTS[error.errno][:2]
    return f"{' or '.join(paths)} {wrong}{remedy and f': {remedy}'}"


def without_numbers(text: str) -> str:
    """Returns a message without the numbers that Python puts before reasons of the system."""
    return re.sub(r"\[Errno -?\d+\] ", "", text)


def shown(path) -> str:
    """Returns a path for a message, cut where it is longer than a few lines."""
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
    return text if len(text) <= PATH_WIDTH else f"{text[:PATH_WIDTH]}..."


def first_line(error: BaseException) -> str:
    """Returns the first line of an error, without the pages that follow it."""
    line = str(error).strip().split("\n")[0] or repr(error)
    return line if len(line) <= 200 else f"{line[:100]}...{line[-100:]}"  # causes come last


def other_fault(error: BaseException) -> BaseException | None:
    """Returns the cause of an error if it is not the file's content: no permission, no memory."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        if isinstance(causes[-1], FileNotFoundError):  # how a library came to know it says nothing
            break
        causes.append(cause)
    for cause in reversed(causes):
        if isinstance(cause, MemoryError) or (_errno(cause) or errno.EIO) not in OF_DAMAGED_FILES:
            return cause
        if re.match(TENSORSTORE, str(cause)) or is_of_network(cause):
            return cause
    return None


def is_of_network(error: BaseException) -> bool:
    """Returns whether a bucket could not be asked."""
    if isinstance(error, FileNotFoundError):
        return False
    of_library = type(error).__module__.split(".")[0] in NETWORK_LIBRARIES
    return of_library or isinstance(error, buckets.Unreachable)


def _errno(error: BaseException) -> int | None:
    """Returns the operating system's number for an error; TensorStore has it in its text."""
    told = re.search(r"os_error_code='(\d+)'", str(error))
    return getattr(error, "errno", None) or (told and int(told[1]))


def unwritable(path: str | Path, error: BaseException, rest: str = "") -> UnwritableError:
    """Returns an error of one line that names the file, the reason and the remedy."""
    if isinstance(error, buckets.Unreachable):  # which says all that
        return UnwritableError(f"{error}{rest}")
    code = _errno(error)
    reason = os.strerror(code) if code else first_line(error)
    remedy = FAULTS[code][-1] if code in FAULTS else ""
    place = "bucket" if str(path).startswith("gs://") else "disk"
    return UnwritableError(
        f"cannot write {path} ({reason}): {remedy or f'see to the {place}'} and run it again{rest}"
    )


@contextlib.contextmanager
def _refused(told: Callable[[OSError], OSError]):
    try:
        yield
    except OSError as error:
        if error.errno is None:  # has a message of its own
            raise
        raise told(error) from error


def writing(path: Path):
    """Returns a context that raises UnwritableError where the operating system refuses a write."""
    return _refused(lambda error: unwritable(path, error))


def reading(path: Path):
    """Returns a context that raises OSError, with the remedy, where the system refuses to read."""
    return _refused(
        lambda error: OSError(
            f"cannot read {path} ({os.strerror(error.errno or 0)}): put it back or make it "
            "readable, and run it again"
        )
    )


def is_of_disk(error: BaseException) -> bool:
    """Returns whether a write failed in the operating system; TensorStore has ValueErrors."""
    return isinstance(error, OSError) or bool(_errno(error) or re.match(TENSORSTORE, str(error)))
