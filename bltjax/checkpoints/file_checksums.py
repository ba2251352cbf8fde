"""The seal of a checkpoint: size and checksum of each of its files, written when it is whole."""

import json
import os
import zlib
from pathlib import Path

import jax

from bltjax.runtime.files import replacing

SEAL = "FILES.json"


def write_seal(checkpoint: Path):
    """Write down size and CRC-32 of every file of a checkpoint; the seal appears at once."""
    sums = {name: _size_and_checksum(checkpoint / name) for name in _files(checkpoint)}
    with replacing(checkpoint / SEAL) as file:
        file.write(json.dumps(sums, separators=(",", ":")).encode())
        file.flush()
        os.fsync(file.fileno())


def check_seal(checkpoint: Path):
    """Compare the files with the seal, if there is one; each process reads its share of them.

    Raises ValueError that names a file that is missing, not expected, or changed.
    """
    try:
        sums = json.loads((checkpoint / SEAL).read_bytes())
    except FileNotFoundError:
        return
    missing = sorted(set(sums) - set(_files(checkpoint)))  # others cannot change what is read
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    for name in sorted(sums)[jax.process_index() :: jax.process_count()]:
        if _size_and_checksum(checkpoint / name) != sums[name]:
            raise ValueError(f"{name} is not as it was written: its size or checksum differs")


def _files(directory: Path) -> list[str]:
    """Paths of all files, relative to the directory."""

    def fail(error):  # pathlib would pass over what may not be read
        raise error

    return [
        str((Path(folder) / name).relative_to(directory))
        for folder, _, names in os.walk(directory, onerror=fail)
        for name in names
    ]


def _size_and_checksum(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]
