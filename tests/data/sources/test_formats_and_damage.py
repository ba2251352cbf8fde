"""A table of formats, of damage, and of the documents that must come out all the same.

`CASES` is generated from writers of formats and kinds of damage. Each case says which documents
survive and what is told of the others; the commands are held to the same table in
tests/commands/test_formats_in_commands.py.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.sources.units import Bad, Document, list_units, read_unit

COUNT = 30  # records of a file
TEXTS = [f"{i} ".encode() * 20 + "é".encode() for i in range(COUNT)]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow", ".stream.arrow")
# What a damaged row holds in its three columns, as bytes; None is a null.
FIELD_DAMAGE = {
    "whole": (TEXTS[3], b"id 3", b"fr"),
    "bad byte in id": (TEXTS[3], b"caf\xe9", b"fr"),
    "bad byte in language": (TEXTS[3], b"id 3", b"f\xff"),
    "bad byte in text": (b"\xff" + TEXTS[3], b"id 3", b"fr"),
    "null text": (None, b"id 3", b"fr"),
    "null id": (TEXTS[3], None, b"fr"),
    "null language": (TEXTS[3], b"id 3", None),
}


class Case(NamedTuple):
    """A file, the texts that must come out of it, and words of what must be told."""

    name: str
    data: bytes
    texts: list[bytes]
    told: tuple[str, ...] = ()


def rows(damage: str) -> list[tuple]:
    """(text, id, language) of each record; that of row 3 is damaged."""
    whole = [(text, b"id %d" % i, b"fr") for i, text in enumerate(TEXTS)]
    return [*whole[:3], FIELD_DAMAGE[damage], *whole[4:]]


def lines(records) -> bytes:
    def value(cell):
        return b"null" if cell is None else b'"' + cell + b'"'

    return b"".join(
        b'{"text": %s, "url": %s, "language": %s}\n' % tuple(map(value, row)) for row in records
    )


def column(cells, kind=pa.string) -> pa.Array:
    """A column of strings that are not checked, as faulty writers leave them."""
    return pa.array(cells, pa.binary()).view(kind())


def table(records, kind=pa.string) -> pa.Table:
    texts, ids, languages = map(list, zip(*records, strict=True))
    columns = dict(text=column(texts, kind), url=column(ids), language=column(languages))
    return pa.table(columns)


def tabled(ending: str, content: pa.Table, **options) -> bytes:
    out = io.BytesIO()
    if ending == ".parquet":
        pq.write_table(content, out, **{"row_group_size": 10, "compression": "zstd"} | options)
    else:
        make = pa.ipc.new_stream if ending == ".stream.arrow" else pa.ipc.new_file
        with make(out, content.schema) as writer:
            writer.write_table(content, max_chunksize=10)
    return out.getvalue()


def cases_of_fields():
    """Damage inside a record: at most that record is lost."""
    for damage in FIELD_DAMAGE:
        survivors = [text for text, _, _ in rows(damage) if text is not None]
        told = ("instead of a string",) if damage == "null text" else ()
        for ending in TABLES:
            yield Case(f"{damage}{ending}", tabled(ending, table(rows(damage))), survivors, told)
        if damage == "bad byte in text":  # JSON is UTF-8, so nothing is known of such a string
            survivors, told = TEXTS[:3] + TEXTS[4:], ("not UTF-8",)
        for ending in LINES:
            for compression, compress in COMPRESS.items():
                data = compress(lines(rows(damage)))
                yield Case(f"{damage}{ending}{compression}", data, survivors, told)


def cases_of_text():
    any_bytes = bytes(range(256)) + b"".join(TEXTS)
    for compression, compress in COMPRESS.items():
        for ending in (".txt", ".md"):
            yield Case(f"whole{ending}{compression}", compress(any_bytes), [any_bytes])
        yield Case(f"two members.txt{compression}", compress(any_bytes) * 2, [any_bytes * 2])
        yield Case(f"no byte.txt{compression}", compress(b""), [b""])


def before_damage(compression: str, data: bytes) -> list[bytes]:
    """What a decompressor gives until it fails, if it is fed byte by byte: a text, or none."""
    machine = {
        ".gz": lambda: zlib.decompressobj(31),
        ".xz": lzma.LZMADecompressor,
        ".bz2": bz2.BZ2Decompressor,
        ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    }[compression]()
    content = b""
    with contextlib.suppress(zlib.error, lzma.LZMAError, OSError, zstandard.ZstdError):
        for i in range(len(data)):
            content += machine.decompress(data[i : i + 1])
    return [content] if content else []


def cases_of_cut_files():
    """A file that is cut off, or goes on with rubbish: what stands before is read."""
    noise = np.random.default_rng(0).bytes(3000).hex().encode()
    for compression, compress in COMPRESS.items():
        if not compression:
            continue
        whole = compress(noise)
        name = f".txt{compression}"
        yield Case(f"garbage behind{name}", whole + b"rubbish", [noise], ("damaged",))
        yield Case(f"zeros behind{name}", whole + b"\0" * 512, [noise])
        kept = before_damage(compression, whole[:-1])
        yield Case(f"last byte missing{name}", whole[:-1], kept, ("cut off",))
        half = len(whole) // 2
        flipped = whole[:half] + bytes([whole[half] ^ 255]) + whole[half + 1 :]
        kept = before_damage(compression, flipped)
        yield Case(f"flipped{name}", flipped, kept, ("damaged",))
        kept = before_damage(compression, whole[:half])
        yield Case(f"half{name}", whole[:half], kept, ("cut off",))
        both, kept = compress(b"first ") + whole[:half], [b"first " + b"".join(kept)]
        yield Case(f"second half{name}", both, kept, ("cut off",))
        yield Case(f"nothing{name}", b"", [], ("empty",))
        yield Case(f"nothing.jsonl{compression}", b"", [], ("empty",))
        records = compress(lines(rows("whole")))
        yield Case(f"garbage behind.jsonl{compression}", records + b"rubbish", TEXTS, ("damaged",))
        lost = 0 if before_damage(compression, records[:-1]) else len(TEXTS)
        kept = TEXTS[lost:]
        yield Case(f"last byte missing.jsonl{compression}", records[:-1], kept, ("cut off",))
    yield Case("nothing.jsonl", b"", [])
    yield Case("half.jsonl", lines(rows("whole"))[:-3], TEXTS[:-1], ("not JSON",))
    for ending in TABLES:
        whole = tabled(ending, table(rows("whole")))
        empty = tabled(ending, table(rows("whole")).slice(0, 0))
        yield Case(f"no row{ending}", empty, [])
        yield Case(f"nothing{ending}", b"", [], ("damaged",))
        told = () if ending == ".stream.arrow" else ("damaged",)
        kept = TEXTS[:10] if ending == ".stream.arrow" else []  # the others have their index last
        yield Case(f"half{ending}", whole[: len(whole) // 2], kept, ("damaged",))
        yield Case(f"garbage behind{ending}", whole + b"rubbish", TEXTS if not told else [], told)


def cases_of_damaged_parts():
    """A damaged row group or record batch costs its own rows."""
    whole = table(rows("whole"))
    data = bytearray(tabled(".parquet", whole))
    begin = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0).dictionary_page_offset
    data[begin + 20 : begin + 60] = bytes(40)
    yield Case("damaged group.parquet", bytes(data), TEXTS[:10] + TEXTS[20:], ("row group 1",))
    checked = bytearray(
        tabled(
            ".parquet", whole, write_page_checksum=True, compression="none", use_dictionary=False
        )
    )
    checked[checked.index(TEXTS[14])] ^= 1  # no decoder can notice
    expected = TEXTS[:10] + TEXTS[20:]
    yield Case("flipped group.parquet", bytes(checked), expected, ("row group 1",))
    for ending in (".arrow", ".stream.arrow"):
        data = bytearray(tabled(ending, whole))
        first = data.index(TEXTS[10] + TEXTS[11])
        offsets = np.frombuffer(data[:first], np.int32)[::1] if first % 4 == 0 else None
        at = 4 * np.flatnonzero(offsets == 2 * len(TEXTS[10]))[-1]
        data[at : at + 4] = (2**30).to_bytes(4, "little")  # the end of the batch's second text
        survivors = TEXTS[:10] + (TEXTS[20:] if ending == ".arrow" else [])
        yield Case(f"damaged batch{ending}", bytes(data), survivors, ("record batch",))
    records = [text * 20 for text in TEXTS]
    whole = array_records(records)
    yield Case("whole.array_record", whole, records)
    yield Case("half.array_record", whole[: len(whole) // 2], [], ("damaged",))
    at = 1000
    damaged = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
    kept = [record for i, record in enumerate(records) if i != 11]  # chunks are independent
    yield Case("flipped record.array_record", damaged, kept, ("damaged",))


def array_records(records) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".array_record") as file:
        writer = ArrayRecordWriter(file.name, "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return Path(file.name).read_bytes()


def cases_of_columns():
    """Tables whose columns are not what is hoped for."""
    texts = [text.decode() for text in TEXTS]
    good = pa.array(texts)
    for kind in (pa.large_string, pa.binary, pa.large_binary, pa.string_view, pa.binary_view):
        for ending in TABLES:
            if ending == ".parquet" or kind not in (pa.string_view, pa.binary_view):
                content = pa.table({"text": good.cast(kind())})
                yield Case(f"{kind.__name__}{ending}", tabled(ending, content), TEXTS)
    bad = [text if i != 3 else b"\xff" for i, text in enumerate(TEXTS)]
    labels = pa.DictionaryArray.from_arrays(pa.array(range(COUNT), pa.int32()), column(bad))
    for ending in TABLES:
        words = pa.table({"text": labels, "url": labels})
        yield Case(f"dictionary{ending}", tabled(ending, words), bad)
        numbers = pa.table({"text": list(range(COUNT)), "url": texts})
        yield Case(f"integers{ending}", tabled(ending, numbers), [], ("'text'", "int64"))
        nested = pa.table({"text": [{"text": t} for t in texts]})
        yield Case(f"nested{ending}", tabled(ending, nested), [], ("'text'", "struct"))
        lists = pa.table({"text": [[t] for t in texts], "id": texts})
        yield Case(f"lists{ending}", tabled(ending, lists), [], ("'text'", "list"))
        times = pa.array(range(COUNT), pa.timestamp("ns"))
        dated = pa.table({"text": good, "id": times, "url": [{"a": 1}] * COUNT, "lang": times})
        yield Case(f"odd ids{ending}", tabled(ending, dated), TEXTS)
        other = pa.table({"body": good, "url": texts})
        yield Case(f"no text{ending}", tabled(ending, other), [], ("'body', 'url'",))
        none = pa.table({"text": pa.nulls(COUNT)})
        yield Case(f"nulls{ending}", tabled(ending, none), [], ("null",))
        twice = pa.Table.from_arrays([good, good], names=["text", "text"])
        yield Case(f"two texts{ending}", tabled(ending, twice), [], ("2 columns are named 'text'",))
        ids = pa.Table.from_arrays([good, good, good], names=["url", "text", "url"])
        yield Case(f"two ids{ending}", tabled(ending, ids), TEXTS)
    out = io.BytesIO()
    with pq.ParquetWriter(out, pa.schema({"text": pa.string()})) as writer:
        for part in (good[:0], good[:7], good[7:7], good[7:]):
            writer.write_table(pa.table({"text": part}))
    yield Case("empty groups.parquet", out.getvalue(), TEXTS)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(30)


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a.txt", b"text")
    else:
        with tarfile.open(fileobj=out, mode="w") as file:
            file.addfile(tarfile.TarInfo("a.txt"))
    return out.getvalue()


def cases_of_containers():
    """What is no text is named, by its first bytes or by its name."""
    numbers = io.BytesIO()
    np.save(numbers, np.arange(3))
    contents = {
        "zip": (archive("zip"), "ZIP"),
        "tar": (archive("tar"), "tar"),
        "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(30), "7z"),
        "npy": (numbers.getvalue(), "NumPy"),
        "png": (PNG, "picture"),
        "jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(20), "picture"),
        "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "PDF"),
        "sqlite": (b"SQLite format 3\0" + bytes(90), "SQLite"),
        "h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        "safetensors": (b"\x10\0\0\0\0\0\0\0" + b'{"a": 1}       ', "weights"),
        "elf": (b"\x7fELF\2\1\1" + bytes(40), "program"),
        "pyc": (b"\xa7\r\r\n" + bytes(4) + b"\1\2\3\4\5\6\7\x08" + b"\xe3\0\0", "program"),
        "lz4": (b"\x04\x22\x4d\x18\x64\x40\xa7", "LZ4"),
        "pickle": (b"\x80\x04\x95\x05\0\0\0\0\0\0\0K\1.", "pickle"),
    }
    for name, (data, word) in contents.items():
        yield Case(f"a {name} named.txt", data, [], (word,))
        yield Case(f"a {name} in gzip.txt.gz", gzip.compress(data), [], (word,))
        yield Case(f"a {name} named.jsonl", data, [], (word,))
    yield Case("a parquet named.txt", tabled(".parquet", table(rows("whole"))), [], ("Parquet",))
    yield Case("an arrow named.txt", tabled(".arrow", table(rows("whole"))), [], ("Arrow",))
    yield Case("compressed twice.txt.gz", gzip.compress(gzip.compress(b"x")), [], ("twice",))
    yield Case("plain named.txt.gz", b"a text that was decompressed", [], ("not gzip",))
    yield Case("plain named.jsonl.zst", lines(rows("whole")), [], ("not zstd",))
    for compression, compress in COMPRESS.items():
        yield Case(f"compressed{compression} named.txt", compress(TEXTS[5]), [TEXTS[5]])
        data = compress(lines(rows("whole")))
        yield Case(f"compressed{compression} named.jsonl", data, TEXTS)
    for text in (
        b"GIF89a is a header",
        b"PK\n",
        b"%PDF- begins a page",
        b"BZh",
        b"ID3 tags",
        b"MZ",
    ):
        yield Case(f"only {text.decode().split()[0]}.txt", text, [text])


CASES = [
    case
    for cases in (
        cases_of_fields,
        cases_of_text,
        cases_of_cut_files,
        cases_of_damaged_parts,
        cases_of_columns,
        cases_of_containers,
    )
    for case in cases()
]


def read(path, **data) -> list:
    source, settings = SourceConfig(path=str(path)), DataConfig(**data)
    units = list_units(source, settings)
    return [found for unit in units for found in read_unit(unit, source, settings)]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_survives_is_read_and_what_does_not_is_told(tmp_path, case):
    path = tmp_path / case.name
    path.write_bytes(case.data)
    found = read(path)
    documents = [document for document in found if isinstance(document, Document)]
    texts = [document.data for document in documents]
    bad = [record for record in found if isinstance(record, Bad)]
    assert texts == case.texts
    told = " ".join(f"{record.name}: {record.reason}" for record in bad)
    assert bool(bad) == bool(case.told), told
    assert all(word in told and case.name in told for word in case.told), told
    assert found == read(tmp_path)  # the same where the file is found in its folder
    parts = read(tmp_path, shard_bytes=200)
    assert [document for document in parts if isinstance(document, Document)] == documents
    assert any(isinstance(record, Bad) for record in parts) == bool(bad)


WHOLE = [case for case in CASES if case.name.startswith(("whole", "dictionary", "odd ids"))]


@settings(max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(WHOLE), st.sampled_from(["flip", "cut", "zero", "insert"]), st.data())
def test_any_damage_is_told_and_never_an_exception(tmp_path, case, damage, data):
    """What has checksums never gives another text in silence, apart from a harmless header."""
    at = data.draw(st.integers(0, len(case.data) - 1))
    content = bytearray(case.data)
    if damage == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "cut":
        del content[at:]
    elif damage == "zero":
        content[at : at + 40] = bytes(len(content[at : at + 40]))
    else:
        content.insert(at, data.draw(st.integers(0, 255)))
    (tmp_path / case.name).write_bytes(content)
    found = read(tmp_path / case.name)
    (tmp_path / case.name).unlink()
    texts = [document.data for document in found if isinstance(document, Document)]
    if case.name.endswith((".gz", ".zst", ".xz", ".bz2", ".array_record")) and texts != case.texts:
        assert any(isinstance(record, Bad) for record in found)
