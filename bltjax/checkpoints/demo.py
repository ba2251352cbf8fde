"""Directories of weights as they are asked for, and the model in the package, `demo`."""

import os
from pathlib import Path

from bltjax.runtime.paths import as_path

NAME = "demo"
MODEL = "model.json"  # in directories of bltjax's own format
DIRECTORY = Path(__file__).parents[1] / "demo"


def directory_of(path: str | os.PathLike) -> Path:
    """Returns the directory that a path means, with the home directory in the place of ~.

    "demo" is the model in the package, unless the current directory has something of that name.
    """
    path = os.path.expanduser(path)
    return DIRECTORY if path == NAME and not os.path.lexists(path) else as_path(path)


def existing(directory: Path) -> Path:
    """Returns a directory of weights. Raises NotADirectoryError or FileNotFoundError for none."""
    if directory.is_file():
        raise NotADirectoryError(
            f"{directory} is a file: give the directory that it is in{way_past(directory)}"
        )
    if not directory.is_dir():
        raise FileNotFoundError(
            f"no directory {directory}: give one with weights (config.json, params.json or "
            f"{MODEL} inside), the working directory of a run, or {NAME}, a model in the package"
            f"{way_past(directory)}"
        )
    return directory


def way_past(path: Path) -> str:
    """Returns how to open the model in the package where a path of its name hides it, or ""."""
    return f"; the model in the package is {DIRECTORY}" if str(path) == NAME else ""
