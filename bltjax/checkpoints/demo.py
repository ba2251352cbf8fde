"""The model in the package, which has the name `demo` where a directory of weights is asked for."""

import os
from pathlib import Path

from bltjax.runtime.paths import as_path

NAME = "demo"
DIRECTORY = Path(__file__).parents[1] / "demo"


def directory_of(path: str | os.PathLike) -> Path:
    """Returns the directory that a path means, with the home directory in the place of ~.

    "demo" is the model in the package, unless the current directory has something of that name.
    """
    path = os.path.expanduser(path)
    return DIRECTORY if path == NAME and not os.path.lexists(path) else as_path(path)


def way_past(path: Path) -> str:
    """Returns how to open the model in the package where a path of its name hides it, or ""."""
    return f"; the model in the package is {DIRECTORY}" if str(path) == NAME else ""
