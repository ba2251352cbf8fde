"""Every record of a file is read once, wherever it is cut, and what is bad says where it stands."""

import gzip
import itertools
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bltjax.data.sources import readers, tables
from bltjax.data.sources.readers import Bad, Document, Fields

FIELDS = Fields(("text", "content"), ("sample_id", "id"), ("language",))


def jsonl(path, start=0, stop=-1):
    return list(readers.read_jsonl(str(path), f"web/{path.name}", start, stop, FIELDS))


def records(count):
    return b"".join(b'{"text": "number %d"}\n' % i for i in range(count))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 12), max_size=8),
    st.lists(st.integers(0, 200), max_size=6),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.booleans(),
    st.sampled_from([1, 3, 1 << 16]),
)
def test_ranges_of_a_file_hold_every_line_once(
    tmp_path, monkeypatch, lengths, cuts, newline, ends, chunk
):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    text = newline.join(b'{"text": "%s"}' % (b"x" * n) for n in lengths) + newline * ends
    path = tmp_path / "a.jsonl"
    path.write_bytes(text)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [jsonl(path, *edge) for edge in itertools.pairwise(edges)]
    whole = jsonl(path)
    assert list(itertools.chain(*parts)) == whole
    assert [len(document.data) for document in whole] == lengths
    for document in whole:
        position = int(document.name.removeprefix("web/a.jsonl:"))
        assert text[position:].startswith(b'{"text": "')


def test_the_first_field_there_is(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {"content": "c", "id": 7, "language": "fr"},
        {"text": "t", "content": "c", "id": 7, "sample_id": "s", "language": None},
        {"text": "", "id": "", "sample_id": None},
        {"text": "t", "id": ["not an id"], "entropies": [1.0]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    third = len("\n".join(map(json.dumps, lines[:2]))) + 1
    fourth = len("\n".join(map(json.dumps, lines[:3]))) + 1
    assert jsonl(path) == [
        Document("7", b"c", "fr"),
        Document("s", b"t"),
        Document(f"web/a.jsonl:{third}", b""),
        Document(f"web/a.jsonl:{fourth}", b"t"),
    ]


def test_any_string_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "\\ud83d\\ude00 \\ud800 \xc3\xa9\\u0000"}\n{"text":"\xe2\x80\xa8"}'
    )
    [first, second] = jsonl(path)
    assert first.data == "😀 ".encode() + b"\xed\xa0\x80 \xc3\xa9\x00"
    assert second.data == "\u2028".encode()


BAD_LINES = {
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "t"': "not JSON: Expecting",
    b"[" * 100_000: "not JSON",
    b'{"text": ' + b"1" * 5000 + b"}": "not JSON",
    b'["text"]': "a list in the place of an object",
    b'{"body": "t"}': "no field 'text' or 'content'",
    b'{"text": 5}': "'text' holds a int",
    b'{"text": null, "content": "c"}': "'text' holds a NoneType",
}


def test_a_bad_line_says_where_and_why(tmp_path):
    good = b'{"text": "t"}'
    text = b"\n".join(line for bad in BAD_LINES for line in (good, b" ", bad)) + b"\n" + good
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    for name, place in (("a.jsonl", "byte"), ("a.jsonl.gz", "line")):
        found = jsonl(tmp_path / name)
        assert sum(isinstance(f, Document) for f in found) == len(BAD_LINES) + 1
        bad = [f for f in found if isinstance(f, Bad)]
        for i, (one, reason) in enumerate(zip(bad, BAD_LINES.values(), strict=True)):
            assert reason in one.reason
            line = 3 * i + 3
            byte = len(b"\n".join(text.split(b"\n")[: line - 1])) + 1
            assert one.name == f"web/{name}:{place} {line if place == 'line' else byte}"


def test_a_very_long_line(tmp_path):
    path = tmp_path / "a.jsonl"
    size = 30_000_000
    path.write_bytes(b'{"text": "' + b"x" * size + b'"}\n{"text": "after"}\n')
    assert [len(document.data) for document in jsonl(path)] == [size, 5]
    with path.open("rb") as raw:
        assert list(readers._lines(raw, 1000, 2000)) == []
        assert raw.tell() < size // 10  # or reading all ranges of a line would be quadratic
    assert [document.data for document in jsonl(path, size // 2, -1)] == [b"after"]


def zstd_stream(*parts):
    """Frames of unknown content size, one of them to be skipped, as tools write them."""
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"meta"
    frames = []
    for part in parts:
        compressor = zstandard.ZstdCompressor().compressobj()
        frames.append(compressor.compress(part) + compressor.flush())
    return skippable.join(frames)


@pytest.mark.parametrize(
    "ending, compress",
    [(".gz", lambda *parts: b"".join(map(gzip.compress, parts))), (".zst", zstd_stream)],
)
def test_compressed_members_and_a_cut(tmp_path, ending, compress):
    path = tmp_path / f"a.jsonl{ending}"
    noise = np.random.default_rng(0).integers(0, 2**60, 15_000)
    text = b"".join(b'{"text": "%d"}\n' % number for number in noise)
    middle = len(text) // 2 + 3  # inside a line
    whole = compress(text[:middle], b"", text[middle:])
    path.write_bytes(whole)
    documents = jsonl(path)
    assert [int(document.data) for document in documents] == noise.tolist()
    assert documents[16].name == f"web/{path.name}:17"
    for cut in (len(whole) - 1, len(whole) * 2 // 3, len(whole) // 4):
        path.write_bytes(whole[:cut])
        *before, bad = jsonl(path)
        assert before == documents[: len(before)]
        assert len(before) > len(documents) * (cut - 70_000) / len(whole)
        assert isinstance(bad, Bad) and "cut off" in bad.reason
        assert bad.name == f"web/{path.name}:line {len(before) + 1}"
    path.write_bytes(whole + b"rubbish")
    *before, bad = jsonl(path)
    assert before == documents and isinstance(bad, Bad)


@pytest.mark.parametrize(
    "module, call, extra",
    [
        ("zstandard", lambda path: list(jsonl(path)), "data"),
        ("pyarrow.parquet", lambda path: tables.parquet_groups(str(path)), "data"),
        ("pyarrow.ipc", lambda path: tables.arrow_layout(str(path)), "data"),
        ("datasets", lambda path: readers.open_dataset(str(path), "", "train"), "hf"),
    ],
)
def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch, module, call, extra):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd_stream(records(1)))
    monkeypatch.setitem(sys.modules, module, None)
    library = module.partition(".")[0]
    with pytest.raises(ValueError, match=rf"{library} is needed.*pip install 'bltjax\[{extra}\]'"):
        call(path)


def parquet(path, start=0, stop=-1):
    return list(tables.read_parquet(str(path), path.name, start, stop, FIELDS))


def arrow(path, start=0, stop=-1):
    return list(tables.read_arrow(str(path), path.name, start, stop, FIELDS))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), "dictionary"])
def test_parquet_rows(tmp_path, kind):
    path = tmp_path / "a.parquet"
    texts = ["é", None, "", "third"] * 100
    column = pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts, kind)
    table = pa.table({"url": texts, "language": ["fr", None, "", "x"] * 100, "text": column})
    pq.write_table(table, path, row_group_size=30)
    found = parquet(path)
    assert found[:4] == [
        Document("a.parquet:0", "é".encode(), "fr"),
        Bad("a.parquet:row 1", "field 'text' holds a NoneType instead of a string"),
        Document("a.parquet:2", b""),
        Document("a.parquet:3", b"third", "x"),
    ]
    assert len(found) == 400 and found[-1].name == "a.parquet:399"
    assert parquet(path, 0, 5) + parquet(path, 5, 14) == found
    assert len(tables.parquet_groups(str(path))) == 14


def test_binary_text_is_kept_as_it_is(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": [b"\xff\x00"], "id": [3]}), path)
    assert parquet(path) == [Document("3", b"\xff\x00")]


def test_a_table_without_a_text_column(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["t"] * 2}), path)
    reason = "no field 'text' or 'content'; the fields there are 'body'"
    assert [bad.reason for bad in parquet(path)] == [reason] * 2


def test_damage_in_the_middle_of_a_table(tmp_path):
    table = pa.table({"text": [f"text {i} " * 20 for i in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="zstd")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    for path, read in (("a.parquet", parquet), ("a.arrow", arrow), ("b.arrow", arrow)):
        path = tmp_path / path
        whole, content = read(path), path.read_bytes()
        assert len(whole) == 1000
        half = len(content) // 2
        path.write_bytes(content[:half])
        *before, bad = read(path)
        assert before == whole[: len(before)] and "cut off" in bad.reason
        assert bool(before) == (path.name == "b.arrow")
    path = tmp_path / "c.parquet"
    pq.write_table(table, path, row_group_size=100, compression="zstd")
    content, whole = bytearray(path.read_bytes()), parquet(path)
    begin = pq.ParquetFile(path).metadata.row_group(5).column(0).data_page_offset
    content[begin + 20 : begin + 60] = b"\0" * 40
    path.write_bytes(content)
    found = parquet(path)
    assert found[:500] == whole[:500] and found[501:] == whole[600:]
    assert found[500].name == "c.parquet" and "row group 5" in found[500].reason
    assert "row 499" in found[500].reason


def test_faults_of_the_disk_are_not_damage(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["t"]}), path)

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(OSError, match="Input/output"):
        parquet(path)


def preprocessed(path, rows, dtype):
    ids, texts, entropies = zip(*rows, strict=True)
    lists = pa.array([e if e is None else np.array(e, dtype) for e in entropies])
    table = pa.table({"sample_id": ids, "text": texts, "entropies": lists})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stored_entropies_come_with_their_text(tmp_path, dtype):
    path = tmp_path / "a.arrow"
    rows = [
        ("one", "é", [0.5, 1.5, 2.5, 3.5]),
        ("short", "abc", [1.0, 2.0]),
        ("three", "", [0.25, 0.75]),
        ("none", "abc", None),
        ("odd", "a", [1.0, float("nan"), 1.0]),
        ("six", "b", [1.0, 2.0, 3.0]),
    ]
    preprocessed(path, rows, dtype)
    found = arrow(path)
    good = [f for f in found if isinstance(f, Document)]
    assert [d.name for d in good] == ["one", "three", "six"]
    for document in good:
        assert document.entropies.dtype == np.float16
        expected = next(e for name, _, e in rows if name == document.name)
        np.testing.assert_array_equal(document.entropies, np.array(expected, np.float16))
    bad = [f.name for f in found if isinstance(f, Bad)]
    assert bad == ["a.arrow:row 0.1", "a.arrow:row 1.1", "a.arrow:row 2.0"]
    assert tables.arrow_layout(str(path)) == (3, True)
    assert [f.name for f in arrow(path, 1, 3)] == [f.name for f in found[2:]]


def test_arrow_without_entropies_in_both_formats(tmp_path):
    table = pa.table({"text": ["a", "b", "c"]})
    for name, make in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        with make(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert arrow(tmp_path / name) == [
            Document(f"{name}:0.0", b"a"),
            Document(f"{name}:0.1", b"b"),
            Document(f"{name}:1.0", b"c"),
        ]
    assert tables.arrow_layout(str(tmp_path / "b.arrow")) == (1, False)


def test_array_records(tmp_path):
    path = str(tmp_path / "a.array_record")
    writer = ArrayRecordWriter(path, "group_size:1")
    contents = [b"\xff\x00", b"", *(b'{"text": "%d", "id": %d}' % (i, i) for i in range(20))]
    for content in contents:
        writer.write(content)
    writer.close()

    def read(start, stop, fields=None):
        return list(readers.read_array_record(path, "a", start, stop, fields))

    whole = read(0, -1)
    assert whole == [Document(f"a:{i}", content) for i, content in enumerate(contents)]
    assert read(0, 5) + read(5, 6) + read(6, 22) == whole
    first, *_, last = read(0, -1, FIELDS)
    assert first == Bad("a:record 0", "not UTF-8") and last == Document("19", b"19")
    with pytest.raises(ValueError, match=r"gs://b/a.*copy it"):
        readers.array_records("gs://b/a")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        readers.array_records(str(tmp_path / "nowhere"))


def test_damaged_array_records(tmp_path):
    path = str(tmp_path / "a.array_record")
    writer = ArrayRecordWriter(path, "group_size:1")
    for i in range(1000):
        writer.write(b"%d" % i * 50)
    writer.close()
    with open(path, "r+b") as file:
        file.seek(70_000)
        file.write(bytes(100))
    found = list(readers.read_array_record(path, "a", 0, -1, None))
    good = [(i, document) for i, document in enumerate(found) if isinstance(document, Document)]
    assert all(document == Document(f"a:{i}", b"%d" % i * 50) for i, document in good)
    bad = [(i, record) for i, record in enumerate(found) if isinstance(record, Bad)]
    assert len(found) == 1000 and len(good) > 990
    for i, record in bad:
        assert record.name == f"a:record {i}" and "damaged" in record.reason


def test_chunks_hold_all_items_in_order_and_little_more_than_asked_for():
    items = [b"aaa", b"", b"bb", b"cccccccc", b"d"]
    assert list(readers.in_chunks(items, len, 5)) == [[b"aaa", b"", b"bb"], [b"cccccccc"], [b"d"]]
    assert list(readers.in_chunks([], len, 4)) == []
