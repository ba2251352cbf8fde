"""Paths of files and directories, local ones and those in a bucket.

A local path is a `pathlib.Path`, one in a bucket an `etils.epath.Path`, which has the same methods.
A bucket has no directories: what is below a name is there, an empty directory is not.
"""

import os
import re
from pathlib import Path

from bltjax.runtime import buckets

REMOTE = "gs://"


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(REMOTE)


def as_path(text: str | os.PathLike) -> Path:
    """Returns the path that a text names, with the home directory in the place of ~.

    Raises OSError, which names the remedy, for a bucket that is not to be read, and ValueError for
    a kind of bucket that is not known.
    """
    text = re.sub(
        r"^gs:/(?!/)", REMOTE, os.path.expanduser(os.fspath(text))
    )  # pathlib drops a slash
    if is_remote(text):
        return buckets.opened(text)
    if "://" in text:
        raise ValueError(
            f"{text}: only buckets of Google Cloud Storage will do ({REMOTE}BUCKET/NAME): choose "
            "one of those, or a directory"
        )
    return Path(text)


def absolute(text: str | os.PathLike) -> Path:
    """Returns the path that a text names, from the root. Raises as `as_path` does."""
    path = as_path(text)
    return path if is_remote(path) else path.absolute()


def make_directory(path: Path):
    """Makes a directory and those above it where they are not there; a bucket needs none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def exists(path: Path) -> bool:
    """Returns whether there is a file."""
    return buckets.found(path) is not None if is_remote(path) else path.exists()


def remove(path: Path):
    """Deletes a file, if it is there."""
    if is_remote(path):
        buckets.delete(path)
    else:
        path.unlink(missing_ok=True)


def read_whole(path: Path) -> bytes:
    """Reads a whole file. Raises OSError."""
    return buckets.read(path) if is_remote(path) else path.read_bytes()
