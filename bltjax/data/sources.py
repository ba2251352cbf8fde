"""Where training bytes come from: the text files below a directory, read as they are.

Nothing is decoded, so nothing can fail to decode: any bytes are a document.
"""

import hashlib
import os
import sysconfig
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bltjax.config import DataConfig


class Document(NamedTuple):
    """One file's content: `name` is its POSIX path relative to the root it was found below."""

    name: str
    data: bytes


def python_library_root() -> Path:
    """Returns the standard library directory of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def list_text_files(
    root: str | os.PathLike,
    suffixes: Sequence[str] = DataConfig.suffixes,
    exclude: Collection[str] = DataConfig.exclude,
) -> list[Path]:
    """Returns the files below `root` that end in one of `suffixes`, sorted by path components.

    Directories whose name is in `exclude` are not entered, nor are linked directories; a linked
    file counts if it leads to a place below `root` whose file is not listed itself. Raises
    FileNotFoundError if `root` is not a directory, OSError if one below it cannot be listed.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no directory {str(root)!r}: give the path of an existing directory of text files"
        )
    found = []
    for directory, subdirectories, names in os.walk(root, onerror=_raise):
        subdirectories[:] = [name for name in subdirectories if name not in exclude]
        found.extend(Path(directory, name) for name in names if name.endswith(tuple(suffixes)))
    resolved = root.resolve()
    inside = [path for path in found if not path.is_symlink() or _leads_into(path, resolved)]
    # Files before the links to them, so that a text is never read twice, under two names.
    inside.sort(key=lambda path: (path.is_symlink(), path.relative_to(root).parts))
    once = {path.resolve(): path for path in reversed(inside)}.values()
    return sorted(once, key=lambda path: path.relative_to(root).parts)


def read_documents(
    root: str | os.PathLike,
    suffixes: Sequence[str] = DataConfig.suffixes,
    exclude: Collection[str] = DataConfig.exclude,
    max_bytes: int | None = None,
) -> list[Document]:
    """Reads the non-empty files that `list_text_files` finds, in its order.

    With `max_bytes` the list ends before the first file that would take the total above it; files
    are never cut. Raises FileNotFoundError if `root` is not a directory, ValueError if no document
    remains, and the OSError of the first file that cannot be read.
    """
    documents, total = [], 0
    for path in list_text_files(root, suffixes, exclude):
        data = path.read_bytes()
        total += len(data)
        if max_bytes is not None and total > max_bytes:
            break
        if data:
            documents.append(Document(path.relative_to(root).as_posix(), data))
    if not documents:
        raise ValueError(
            f"no non-empty file below {str(root)!r} ends in one of {tuple(suffixes)} within"
            f" max_bytes={max_bytes}: choose another root, other suffixes or a larger max_bytes"
        )
    return documents


def split_by_file(
    documents: Iterable[Document], validation_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Splits documents into (train, validation) by a hash of each name; order is kept.

    A document's side depends on `seed`, `validation_fraction` and its own name only, so it never
    changes when other files come and go; a larger fraction only adds to the validation side.
    Raises ValueError if the fraction is not between 0 and 1 or if a side would be empty.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(
            f"validation_fraction={validation_fraction} must lie strictly between 0 and 1"
        )
    train, validation = [], []
    for document in documents:
        held_out = _unit_hash(f"{seed}:{document.name}") < validation_fraction
        (validation if held_out else train).append(document)
    if not train or not validation:
        raise ValueError(
            f"validation_fraction={validation_fraction} with seed={seed} gives {len(train)} train"
            f" and {len(validation)} validation documents: add documents, or change the fraction"
            " or the seed"
        )
    return train, validation


def _raise(error: OSError) -> None:
    raise error


def _leads_into(link: Path, resolved_root: Path) -> bool:
    return link.resolve().is_relative_to(resolved_root)


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that is the same for the same text on every machine."""
    # surrogateescape: POSIX file names may hold bytes that are not UTF-8.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
