"""Tells faults of the disk from faults of a checkpoint, with a remedy for each."""

import errno
import os
import re
from pathlib import Path

from bltjax.checkpoints.orbax_weights import first_line

REMEDIES = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some disk space",
    errno.EACCES: "make the directory writable",
    errno.EPERM: "make the directory writable",
    errno.EROFS: "make the directory writable",
    errno.ENOENT: "put the directory back",
    errno.ENOTDIR: "move the file that is in the way",
    errno.EEXIST: "move the file that is in the way",
}
OF_DAMAGED_FILES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
TENSORSTORE = "RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE"  # how its messages begin


def other_fault(error: BaseException) -> BaseException | None:
    """Returns the cause of an error if it is not the checkpoint: no permission, no memory."""
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


def unwritable(path: Path, error: Exception, rest: str = "") -> OSError:
    """Returns an error of one line that names the file, the reason and the remedy."""
    code = _errno(error)
    reason = os.strerror(code) if code else first_line(error)
    remedy = REMEDIES.get(code, "see to the disk")
    return OSError(f"cannot write {path} ({reason}): {remedy} and run it again{rest}")


def is_of_disk(error: BaseException) -> bool:
    """Returns whether a write failed in the operating system; TensorStore has ValueErrors."""
    return isinstance(error, OSError) or bool(_errno(error) or re.match(TENSORSTORE, str(error)))
