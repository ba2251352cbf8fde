"""Errors of the disk in one line: what cannot be written, why, and the remedy."""

import contextlib
import errno
import os
import re
from pathlib import Path

REMEDIES = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some disk space",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EACCES: "make the directory writable",
    errno.EPERM: "make the directory writable",
    errno.EROFS: "make the directory writable",
    errno.ENOENT: "put the directory back",
    errno.ENOTDIR: "move the file that is in the way",
    errno.EEXIST: "move the file that is in the way",
    errno.EISDIR: "move the directory that is in the way",
    errno.ENOTEMPTY: "move the directory that is in the way",
}
OF_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # no reader gets these
OF_DAMAGED_FILES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
TENSORSTORE = "RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE"  # how its messages begin


class UnwritableError(OSError):
    """Raised where the disk refuses a write; the message names the file and the remedy."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error, without the pages that follow it."""
    line = str(error).strip().split("\n")[0] or repr(error)
    return line if len(line) <= 200 else f"{line[:100]}...{line[-100:]}"  # causes come last


def other_fault(error: BaseException) -> BaseException | None:
    """Returns the cause of an error if it is not the file's content: no permission, no memory."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    for cause in reversed(causes):
        if isinstance(cause, MemoryError) or (_errno(cause) or errno.EIO) not in OF_DAMAGED_FILES:
            return cause
        if re.match(TENSORSTORE, str(cause)):
            return cause
    return None


def _errno(error: BaseException) -> int | None:
    """Returns the operating system's number for an error; TensorStore has it in its text."""
    told = re.search(r"os_error_code='(\d+)'", str(error))
    return getattr(error, "errno", None) or (told and int(told[1]))


def unwritable(path: str | Path, error: BaseException, rest: str = "") -> UnwritableError:
    """Returns an error of one line that names the file, the reason and the remedy."""
    code = _errno(error)
    reason = os.strerror(code) if code else first_line(error)
    remedy = REMEDIES.get(code, "see to the disk")
    return UnwritableError(f"cannot write {path} ({reason}): {remedy} and run it again{rest}")


@contextlib.contextmanager
def writing(path: Path):
    """Raises UnwritableError, with the remedy, where the operating system refuses the block."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # has a message of its own
            raise
        raise unwritable(path, error) from error


def is_of_disk(error: BaseException) -> bool:
    """Returns whether a write failed in the operating system; TensorStore has ValueErrors."""
    return isinstance(error, OSError) or bool(_errno(error) or re.match(TENSORSTORE, str(error)))
