"""Tells what a file holds, by its name and by its first bytes.

Any bytes are text, but those of a compressed file are another text than the one that is meant, and
those of an archive or a picture are none. The first are decompressed; the others are named.
"""

import re

HEAD = 512  # bytes that are looked at
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}  # by ending
ENDINGS = {
    "jsonl": (
        ".jsonl",
        ".ndjson",
        *(lines + c for lines in (".jsonl", ".ndjson", ".json") for c in COMPRESSED),
    ),
    "parquet": (".parquet",),
    "array_record": (".array_record", ".arrayrecord"),
    "arrow": (".arrow",),
}

_CODECS = {
    "gzip": rb"\x1f\x8b\x08",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "xz": rb"\xfd7zXZ\x00",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
}
_CONTAINERS = {
    "a ZIP archive or a file built on one": rb"PK(\x03\x04|\x05\x06|\x07\x08)",
    "a tar archive": rb".{257}ustar",
    "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
    "a RAR archive": rb"Rar!\x1a\x07",
    "a cabinet or ar archive": rb"MSCF\x00|!<arch>\n",
    "a file compressed with LZ4, LZMA, lzip, Snappy or compress": (
        rb"\x04\x22\x4d\x18|\x5d\x00\x00.{2}[\x00\xff]{5}|LZIP\x01|\xff\x06\x00\x00sNaPpY|\x1f[\x9d\xa0]"
    ),
    "a Parquet file": rb"PAR[1E]",
    "an Arrow file": rb"ARROW1\x00\x00|FEA1",
    "an Arrow stream": rb"\xff\xff\xff\xff[^\x00].{2}\x00.{2}\x00\x00",
    "an ArrayRecord or Riegeli file": rb"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f",
    "an Avro or ORC file": rb"Obj\x01|ORC[\x00-\x08]",
    "a NumPy array": rb"\x93NUMPY",
    "an HDF5 file": rb"\x89HDF\r\n\x1a\n",
    "an SQLite database": rb"SQLite format 3\x00",
    "a pickle": rb"\x80[\x02\x03][\]}(cXK\x8a]|\x80[\x04\x05]\x95",
    "safetensors or GGUF weights": rb".{5}\x00\x00\x00\{\"|GGUF[\x01-\x09]",
    "a picture": (
        rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|II\x2a\x00|MM\x00\x2a|RIFF.{4}WEBP|BM.{4}\x00{4}"
        rb"|\x00\x00\x01\x00[\x01-\x20]\x00|8BPS\x00"
    ),
    "sound or video": (
        rb"OggS\x00|fLaC\x00|ID3[\x02-\x04]|RIFF.{4}(WAVE|AVI )|.{4}ftyp|\x1a\x45\xdf\xa3|FLV\x01"
        rb"|\x00\x00\x01\xba"
    ),
    "a PDF or PostScript file": rb"%PDF-|\xc5\xd0\xd3\xc6",
    "an old Office document": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "a font": rb"wOF[F2]|\x00\x01\x00\x00\x00|OTTO\x00",
    "a compiled program": (
        rb"\x7fELF|MZ.\x00|\xca\xfe\xba\xbe|[\xce\xcf]\xfa\xed\xfe|\x00asm|.{2}\r\n[\x00-\x03]\x00{3}.{8}[\xe3c]"
    ),
}
_MAGIC = {kind: re.compile(magic, re.DOTALL) for kind, magic in (_CODECS | _CONTAINERS).items()}
# Where the name alone says it: a damaged archive is no text either.
_NAMES = {
    "an archive": ".zip .tar .tgz .tbz2 .txz .7z .rar .jar .whl .apk .cab .iso .dmg",
    "a file compressed in a way that is not read": ".lz4 .lzma .lz .sz .br .Z .lzo",
    "a table": ".parquet .arrow .feather .orc .avro .array_record .arrayrecord .tfrecord .lance",
    "arrays or weights": ".npy .npz .h5 .hdf5 .pt .pth .safetensors .gguf .pkl .pickle .onnx",
    "a database": ".sqlite .sqlite3",
    "a picture": ".png .jpg .jpeg .gif .webp .tif .tiff .bmp .ico .heic .avif .psd",
    "sound or video": ".mp3 .mp4 .wav .flac .ogg .opus .m4a .avi .mov .mkv .webm",
    "a document that is no plain text": (
        ".pdf .docx .xls .xlsx .pptx .odt .ods .odp .epub .mobi .djvu"
    ),
    "a font": ".ttf .otf .woff .woff2",
}
_NAMED = {ending: kind for kind, endings in _NAMES.items() for ending in endings.split()}


def codec_of(head: bytes) -> str | None:
    """Returns the name of the compression of a file that begins with `head`, None for none."""
    return next((codec for codec in _CODECS if _MAGIC[codec].match(head)), None)


def container_of(head: bytes, name: str) -> str | None:
    """Returns what a file is that is no text, such as "a picture"; None for any other file.

    head: its first HEAD bytes, or all of them where it has fewer.
    """
    # Clean text is never taken for a container, however it begins.
    if not _is_clean(head):
        found = next((kind for kind in _CONTAINERS if _MAGIC[kind].match(head)), None)
        if found:
            return found
    ending = next((e for e in _NAMED if name.lower().endswith(e.lower())), None)
    return ending and f"{_NAMED[ending]} (by its ending, {ending})"


def compression_ending(name: str) -> str:
    """Returns the ending of a name that tells of compression that is read, "" for none."""
    found = next((ending for ending in COMPRESSED if name.lower().endswith(ending)), "")
    return name[len(name) - len(found) :]


def without_compression(name: str) -> str:
    """Returns the name that a file would have uncompressed."""
    return name.removesuffix(compression_ending(name))


def _is_clean(head: bytes) -> bool:
    """Returns whether bytes are UTF-8 without control characters; the last may be cut."""
    if re.search(rb"[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]", head):
        return False
    for cut in range(4):
        try:
            head[: len(head) - cut].decode()
            return True
        except UnicodeDecodeError:
            if len(head) < HEAD:
                return False
    return False
