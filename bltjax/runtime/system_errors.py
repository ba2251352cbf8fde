"""Says errors of the operating system in words, with a remedy."""

import errno
import os
import re

PATH_WIDTH = 300  # of a path that is shown

# What is wrong with a path, and what helps.
WORDS = {
    errno.ENOENT: "{path} is not there: check the path",
    errno.EACCES: "{path} may not be used: change its permissions, or choose another path",
    errno.EPERM: "{path} may not be changed: change its permissions, or choose another path",
    errno.EISDIR: "{path} is a directory: give a file",
    errno.ENOTDIR: "{path} leads through a file that is no directory: check the path",
    errno.EEXIST: "{path} exists: choose another path, or delete it",
    errno.ENOTEMPTY: "{path} is a directory with files in it: choose another path, or empty it",
    errno.ENOSPC: "{path} cannot be written, no space is left there: free some disk space",
    errno.EDQUOT: "{path} cannot be written, the quota is used up: free some disk space",
    errno.EFBIG: "{path} cannot be written, the file is too large: raise the limit (ulimit -f)",
    errno.EROFS: "{path} is on a file system that is read only: choose another path",
    errno.ENAMETOOLONG: "{path} is too long a name: choose a shorter path",
    errno.ELOOP: "{path} is a link that leads back to itself: check the path",
    errno.EMFILE: "{path} cannot be opened, too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "{path} cannot be opened, too many files are open on this machine",
    errno.ENXIO: "{path} is a device that is not there, or a pipe that nobody reads",
    errno.EIO: "{path} cannot be read or written, the disk reports an error: see to the disk",
    errno.ESTALE: "{path} is on a network disk that was unmounted: mount it again",
    errno.ENOMEM: "{path} cannot be opened, no memory is left",
    errno.EBADF: "{path} is closed",
}


def in_words(error: BaseException, name: str | None = None) -> str:
    """Returns an error of the system as a path, what is wrong with it, and a remedy.

    name: stands for the path of an error that has none. Other errors keep their message, but for
    the numbers of errors of the system inside it.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return without_numbers(str(error))
    path = error.filename if error.filename is not None else name
    paths = [shown(p) for p in (path, error.filename2) if p is not None]
    words = WORDS.get(error.errno)
    reason = (error.strerror or os.strerror(error.errno)).rstrip(".")
    # A library may put a sentence of its own into the place of the system's.
    if words is None or reason != os.strerror(error.errno):
        return f"{' and '.join(paths)}: {without_numbers(reason)}" if paths else reason
    if not paths:  # only standard input can be closed, see endings.py
        paths = ["standard input" if error.errno == errno.EBADF else "a file"]
    return words.replace("{path}", " or ".join(paths))


def without_numbers(text: str) -> str:
    """Returns a message without the numbers that Python puts before reasons of the system."""
    return re.sub(r"\[Errno -?\d+\] ", "", text)


def shown(path) -> str:
    """Returns a path for a message, cut where it is longer than a few lines."""
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
    return text if len(text) <= PATH_WIDTH else f"{text[:PATH_WIDTH]}..."
