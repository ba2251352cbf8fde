"""Undoes compression, and keeps what stands before a damage: gzip, zstd, xz, bzip2."""

import bz2
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from bltjax.data.sources.formats import (
    COMPRESSED,
    HEAD,
    codec_of,
    compression_ending,
    container_of,
    without_compression,
)
from bltjax.data.sources.libraries import need

_CHUNK = 1 << 16


class Unreadable(ValueError):
    """The content of a file is no text that can be read; the message says why."""


class Content(io.RawIOBase):
    """A file of the decompressed content of another, up to its end or to the first damage.

    `damage` says what is wrong, once all before it has been read; it is None for a sound file.
    """

    def __init__(self, raw: BinaryIO, codec: str):
        self.damage: str | None = None
        self._blocks, self._left = _decompressed(raw, codec), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        filled = 0
        while filled < len(buffer):
            if not self._left:
                try:
                    self._left = memoryview(next(self._blocks))
                except StopIteration:
                    break
                except Unreadable as error:
                    self.damage = str(error)
                    break
            count = min(len(buffer) - filled, len(self._left))
            buffer[filled : filled + count] = self._left[:count]
            self._left, filled = self._left[count:], filled + count
        return filled


def open_content(raw: BinaryIO, name: str) -> BinaryIO:
    """Returns a file of the text in an opened file: itself, or a reader of a `Content`.

    The first bytes decide what is decompressed. Raises Unreadable where they, or the name, tell of
    something that is no text.
    """
    head = raw.read(HEAD)
    raw.seek(0)
    codec, ending = codec_of(head), compression_ending(name)
    if ending and codec is None:
        wanted = COMPRESSED[ending.lower()]
        raise Unreadable(
            f"its name ends in {ending} and its content is not {wanted}: it is damaged, or was "
            "decompressed and should lose that ending"
            if head
            else "the compressed file is empty"
        )
    content, inner = raw, name
    if codec:
        content, inner = io.BufferedReader(Content(raw, codec), _CHUNK), without_compression(name)
        head = content.peek(HEAD)[:HEAD]
    what = "compressed twice" if codec and codec_of(head) else container_of(head, inner)
    if what:
        raise Unreadable(
            f"it is {what}, which is not read as text: leave it out, unpack it, or take its bytes "
            "as they are with kind 'bytes'"
        )
    return content


def damage_of(content: BinaryIO) -> str | None:
    """Returns what was wrong with a file from `open_content` that was read to its end."""
    return getattr(getattr(content, "raw", None), "damage", None)


def _decompressed(raw: BinaryIO, codec: str) -> Iterator[bytes]:
    """Yields the content of consecutive members or frames; zeros between them are padding.

    Raises Unreadable at the first damage, after everything that can be decompressed before it.
    """
    machine, errors = None, _errors(codec)
    position = member = given = 0  # where the piece and the member begin; bytes of it that are out
    piece = raw.read(_CHUNK)
    while piece:
        if machine is None:
            position += len(piece) - len(piece.lstrip(b"\0"))
            piece = piece.lstrip(b"\0")
            machine, member, given = _machine(codec), position, 0
        try:
            content = machine.decompress(piece) if piece else b""
        except errors as error:
            yield from _up_to_damage(raw, codec, member, given)
            raise Unreadable(
                f"the compressed file is cut off or damaged from here on: {error}"
            ) from error
        yield content
        given += len(content)
        unused = machine.unused_data if machine.eof else b""
        position += len(piece) - len(unused)
        if machine.eof or not piece:
            machine = None
        piece = unused or raw.read(_CHUNK)
    if machine:
        raise Unreadable(
            f"the compressed file is cut off or damaged from here on: it ends inside its {codec} "
            "data"
        )


def _up_to_damage(raw: BinaryIO, codec: str, member: int, given: int) -> Iterator[bytes]:
    """Yields what a damaged member holds beyond its first `given` bytes.

    Decompressors drop what they have when they fail, so this one gets the bytes one by one.
    """
    raw.seek(member)
    machine, before, size = _machine(codec), 0, _CHUNK
    while piece := raw.read(size):
        start = raw.tell() - len(piece)
        try:
            content = machine.decompress(piece)
        except _errors(codec):
            if size == 1:
                return
            # Once more, up to this piece as before and then byte by byte.
            machine, size = _replayed(raw, codec, member, start), 1
            continue
        yield content[max(given - before, 0) :]
        before += len(content)


def _replayed(raw: BinaryIO, codec: str, member: int, end: int):
    """Returns a decompressor that has read [member, end) of a file, which stands at `end`."""
    machine = _machine(codec)
    raw.seek(member)
    while raw.tell() < end:
        machine.decompress(raw.read(min(_CHUNK, end - raw.tell())))
    return machine


def _machine(codec: str):
    if codec == "gzip":
        return zlib.decompressobj(31)
    if codec == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    if codec == "bzip2":
        return bz2.BZ2Decompressor()
    # Frames made with --long ask for windows of up to 2 GB.
    zstandard = need("zstandard", "data")
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _errors(codec: str) -> tuple[type[Exception], ...]:
    return {
        "gzip": (zlib.error,),
        "xz": (lzma.LZMAError,),
        "bzip2": (OSError, ValueError),  # it reads no file
        "zstd": (need("zstandard", "data").ZstdError,) if codec == "zstd" else (),
    }[codec]
