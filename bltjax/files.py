"""Files that are whole or not there."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file to write, which becomes `path` when the block ends.

    A process killed meanwhile leaves the old file, or none, and one with the suffix `.partial`.
    """
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        yield file
    os.replace(partial, path)
