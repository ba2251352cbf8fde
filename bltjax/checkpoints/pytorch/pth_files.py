"""Reads files of torch.save without torch and without running code in them.

Such a file is a zip archive: a pickle with the structure (see `pth_pickle`), and an entry of plain
bytes for each storage, of which tensors are views.
"""

import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from bltjax.checkpoints.lazy_arrays import BLOCK_BYTES
from bltjax.checkpoints.pytorch.pth_pickle import Entry, read_program
from bltjax.checkpoints.pytorch.stored_array import Refused, parsing
from bltjax.runtime.progress import OnProgress

MAX_PICKLE_BYTES = 8 * 2**20  # enough for fifty thousand tensors

_KIND = "torch.save"
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_ENCRYPTED, _UTF_8 = 0x41, 0x800  # flag bits of a zip entry


def open_pth(path: Path) -> Any:
    """Returns the nested dicts, lists and tuples in a file, with lazy arrays for tensors.

    Attributes that torch adds to ordered dicts and parameters are dropped. Damage in the bytes of
    tensors is not noticed here but by `verify`. Raises FileNotFoundError, or ValueError for a file
    that is damaged or holds anything but tensors and plain values.
    """
    path = Path(path)
    with parsing(path, _KIND):
        program, storages = _read_archive(path)
        return read_program(program, path, storages)


def verify(path: Path, on_progress: OnProgress = None) -> list[str]:
    """Checks the CRC-32 of all storages; returns a line for each damaged one.

    on_progress: called with the number of bytes of each block. Raises like `open_pth`.
    """
    path, problems = Path(path), []
    with parsing(path, _KIND):
        _, storages = _read_archive(path)
    with path.open("rb") as file:
        for key, entry in storages.items():
            if _crc(file, entry, on_progress) != entry.crc:
                problems.append(
                    f"{path}: storage {key!r} is damaged (CRC-32 differs): download it again"
                )
    return problems


def _crc(file, entry: Entry, on_progress: OnProgress) -> int:
    file.seek(entry.start)
    crc, left = 0, entry.size
    while left and (block := file.read(min(left, BLOCK_BYTES))):
        crc, left = zlib.crc32(block, crc), left - len(block)
        if on_progress:
            on_progress(len(block))
    return crc


def _read_archive(path: Path) -> tuple[bytes, dict[str, Entry]]:
    """Returns the pickle, and the places of the storages by key."""
    with path.open("rb") as file:
        if file.read(len(_LEGACY_START)) == _LEGACY_START:
            raise Refused(
                f"{path} has the format of torch before 1.6: load it in a current torch and "
                "save it again"
            )
        with zipfile.ZipFile(file) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            if len(infos) != len(archive.infolist()):
                raise ValueError("two entries have one name")
            # In the archive's only folder, whose name is arbitrary.
            pickles = [name for name in infos if re.fullmatch(r"[^/]*/data\.pkl", name)]
            if len(pickles) != 1:
                raise ValueError("it has no data.pkl")
            top = pickles[0].removesuffix("data.pkl")
            _check_byte_order(path, archive, infos.get(f"{top}byteorder"))
            program = _small_entry(archive, infos[pickles[0]])
            return program, _storages(file, infos, f"{top}data/")


def _check_byte_order(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> None:
    found = b"little" if info is None else _small_entry(archive, info)
    if found != b"little":
        raise Refused(f"{path} has byte order {found[:20]!r}: save it on a little-endian machine")


def _small_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Reads a small entry, of which ZipFile checks the CRC-32."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"entry {info.filename!r} is compressed")
    if info.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"{info.filename!r} has {info.file_size} bytes, over {MAX_PICKLE_BYTES}")
    return archive.read(info)


def _storages(file, infos: dict[str, zipfile.ZipInfo], folder: str) -> dict[str, Entry]:
    size = file.seek(0, os.SEEK_END)
    entries = {
        name.removeprefix(folder): _entry(file, info, size)
        for name, info in infos.items()
        if name.startswith(folder)
    }
    if sum(entry.size for entry in entries.values()) > size:
        raise ValueError("its entries overlap")
    return entries


def _entry(file, info: zipfile.ZipInfo, file_size: int) -> Entry:
    """Locates an entry's bytes: after its local header, whose length is in that header only."""
    stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    if not stored or info.flag_bits & _ENCRYPTED:
        raise ValueError(f"entry {info.filename!r} is compressed or encrypted")
    file.seek(info.header_offset)
    header = file.read(30)
    num_name, num_extra = struct.unpack("<26x2H", header)
    name = file.read(num_name)
    encoding = "utf-8" if info.flag_bits & _UTF_8 else "cp437"
    if not header.startswith(b"PK\3\4") or name != info.orig_filename.encode(encoding):
        raise ValueError(f"entry {info.filename!r} is not where the directory has it")
    start = info.header_offset + len(header) + num_name + num_extra
    if start + info.file_size > file_size:
        raise ValueError(f"entry {info.filename!r} ends past the file")
    return Entry(start, info.file_size, info.CRC)
