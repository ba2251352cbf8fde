"""Checksums of the files of a directory, so that a flipped bit is noticed whatever the format.

`checksums.json` holds size and SHA-256 by file name, as `sha256sum` and the Hugging Face hub show
it: {"sha256": {"model.safetensors": {"bytes": 1234, "digest": "9f86d0..."}}}. Files that it does
not list do no harm.
"""

import hashlib
import os
from pathlib import Path, PurePosixPath

from bltjax.runtime.files import UNFINISHED, write_json
from bltjax.runtime.plain_files import check_regular, parse_json, read_bytes, reason
from bltjax.runtime.progress import OnProgress

CHECKSUMS = "checksums.json"
CARD = "README.md"  # which is there to be edited
_KIND = "sha256"
_READ_BYTES = 2**20  # in memory at a time
_AGAIN = f"copy or convert it again, or delete {CHECKSUMS} if it was changed on purpose"


def write_checksums(directory: Path, on_progress: OnProgress = None):
    """Writes checksums.json of all files below a directory but the card. Raises OSError."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    listed = {
        path.relative_to(directory).as_posix(): dict(
            bytes=path.stat().st_size, digest=_digest(path, on_progress)
        )
        for path in files
        if path not in (directory / UNFINISHED, directory / CHECKSUMS, directory / CARD)
    }
    write_json(directory / CHECKSUMS, {_KIND: listed})


def checksum_problems(directory: Path, on_progress: OnProgress = None) -> list[str]:
    """Returns a line for each listed file that is not as it was written; none without a list.

    Reads every listed file once, a mebibyte at a time.
    """
    path = directory / CHECKSUMS
    if not (path.exists() or path.is_symlink()):
        return []
    try:
        listed = _read(path)
    except (ValueError, OSError) as error:
        return [f"{CHECKSUMS} is damaged ({reason(error)}): {_AGAIN}"]
    found = (_problem(directory, name, *said, on_progress) for name, said in listed.items())
    return [problem for problem in found if problem]


def _read(path: Path) -> dict[str, tuple[int, str]]:
    """Returns size and digest by the names of files, which are all below the directory."""
    content = parse_json(read_bytes(path))
    files = content.get(_KIND) if isinstance(content, dict) else None
    if not files or not isinstance(files, dict):
        raise ValueError(f"it has no {_KIND} of any file")
    listed = {}
    for name, entry in files.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "digest"}:
            raise ValueError(f"{name!r} has no bytes and digest")
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise ValueError(f"{name!r} is no file of this directory")
        listed[name] = entry["bytes"], entry["digest"]
    return listed


def _problem(directory: Path, name: str, size, digest, on_progress: OnProgress) -> str | None:
    path = directory / name
    try:
        check_regular(path)
        if (found := os.stat(path).st_size) != size:
            return f"{name} has {found} bytes, {CHECKSUMS} says {size}: {_AGAIN}"
        if (found := _digest(path, on_progress)) != digest:
            return f"{name} has {_KIND} {found}, {CHECKSUMS} says {digest}: {_AGAIN}"
    except FileNotFoundError:
        return f"{name} is missing, {CHECKSUMS} lists it: {_AGAIN}"
    except (ValueError, OSError) as error:
        return f"{name} cannot be read ({reason(error)}): {_AGAIN}"
    return None


def _digest(path: Path, on_progress: OnProgress) -> str:
    digest = hashlib.new(_KIND, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            if on_progress:
                on_progress(len(block))
    return digest.hexdigest()
