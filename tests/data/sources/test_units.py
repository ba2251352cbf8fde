"""Files are found by one set of rules, stand in a seeded order, and make units of even size."""

import ast
import gzip
import hashlib
import json
import os
import socket

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.sources import units as sources
from bltjax.data.sources.files import find_files
from bltjax.data.sources.units import Bad, Document


def write(root, name, data=b"x"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def lines(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read(path, kind="auto", source=None, **data):
    """All documents of a source, by unit."""
    source = source or SourceConfig(path=str(path), kind=kind)
    data = DataConfig(**data)
    units = sources.list_units(source, data)
    assert [u.name for u in units] == sorted({u.name for u in units})
    # As another process gets them.
    units = [sources.Unit(**json.loads(json.dumps(unit._asdict()))) for unit in units]
    return [list(sources.read_unit(unit, source, data)) for unit in units]


def names(path, kind="auto", **data):
    return sorted(document.name for unit in read(path, kind, **data) for document in unit)


def test_a_text_file_is_a_document_whatever_its_bytes(tmp_path):
    data = bytes(range(256)) + b"\r\n\xff\xfe\x00"
    write(tmp_path, "a/b.py", data)
    write(tmp_path, "empty.py", b"")
    [unit] = read(tmp_path)
    assert sorted(unit) == [Document("a/b.py", data), Document("empty.py", b"")]


def test_in_a_directory_the_kind_follows_from_the_name(tmp_path):
    for name in ("a.py", "deep/er/b.txt", "c.so", "py", ".hidden.py", ".cache/d.py", "tests/e.py"):
        write(tmp_path, name)
    write(tmp_path, "g.jsonl", lines({"text": "t", "id": "in lines"}))
    pq.write_table(pa.table({"text": ["t"], "id": ["in parquet"]}), tmp_path / "h.parquet")
    assert names(tmp_path) == ["a.py", "deep/er/b.txt", "in lines", "in parquet"]
    assert names(tmp_path, suffixes=(".so",), exclude=("deep",)) == [
        "c.so",
        "in lines",
        "in parquet",
    ]
    assert names(tmp_path, kind="parquet") == ["in parquet"]
    assert names(tmp_path, kind="text", suffixes=(".jsonl",)) == ["g.jsonl"]
    assert names(f"{tmp_path}/**", kind="jsonl") == ["in lines"]


def test_a_named_file_is_always_read(tmp_path):
    write(tmp_path, "LICENSE")
    write(tmp_path, "tests/dump", lines({"content": "t", "title": "T"}))
    write(tmp_path, "odd[1].py")
    assert names(tmp_path / "LICENSE") == ["LICENSE"]
    assert names(tmp_path / "odd[1].py") == ["odd[1].py"]
    assert names(tmp_path / "tests/dump", kind="jsonl") == ["T"]


def test_a_glob_names_files_and_directories(tmp_path, monkeypatch):
    for name in (
        "a/x.md",
        "a/y.so",
        "b/x.md",
        "b/deep/z.md",
        "tests/x.md",
        ".own/x.md",
        "b/.md",
        "q",
    ):
        write(tmp_path, name)
    assert names(f"{tmp_path}/*/*") == ["a/x.md", "a/y.so", "b/deep/z.md", "b/x.md"]
    assert names(f"{tmp_path}/[ab]") == ["a/x.md", "b/deep/z.md", "b/x.md"]
    assert names(f"{tmp_path}/**/z*") == ["b/deep/z.md"]
    assert names(f"{tmp_path}/b/?.md") == ["x.md"]
    monkeypatch.chdir(tmp_path)
    assert names("*/x.md") == names("./*/x.md") == ["a/x.md", "b/x.md"]
    assert names(".") == ["a/x.md", "b/deep/z.md", "b/x.md"]


def test_a_glob_prefers_the_own_names_of_files_and_may_be_of_all(tmp_path, monkeypatch):
    write(tmp_path, "store/text.py")
    write(tmp_path, "top.py")
    (tmp_path / "a link").symlink_to("store")
    assert names(tmp_path / "*") == ["store/text.py", "top.py"]
    monkeypatch.chdir(tmp_path)
    assert names("*") == names("**") == ["store/text.py", "top.py"]


def test_follows_links_to_files_below_root_only(tmp_path):
    root = tmp_path / "root"
    write(root, "store/blob", b"inside")
    write(root, "listed.py", b"listed")
    write(tmp_path, "elsewhere/secret.py", b"outside")
    (root / "link.py").symlink_to("store/blob")
    (root / "link2.py").symlink_to("store/blob")
    (root / "again.py").symlink_to("listed.py")
    (root / "leaves.py").symlink_to(tmp_path / "elsewhere/secret.py")
    (root / "directory").symlink_to(tmp_path / "elsewhere")
    (root / "directory.py").symlink_to("store")
    (root / "loop").symlink_to(root)
    (tmp_path / "alias").symlink_to(root)
    for path in (root, tmp_path / "alias"):
        assert names(path) == ["link.py", "listed.py"]
    # What is named is meant.
    assert names(f"{root}/le*.py") == ["leaves.py"]
    assert names(f"{root}/l*.py") == ["leaves.py", "link.py", "listed.py"]


def test_errors_of_the_disk_are_raised(tmp_path, monkeypatch):
    write(tmp_path, "closed/b.py")
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)  # Modes do not stop root, who may run the tests.
    with pytest.raises(PermissionError, match="closed"):
        read(tmp_path)


def left_out(path, **data):
    """Sentences on what is left out, and names of what is read."""
    source, settings = SourceConfig("web", str(path)), DataConfig(**data)
    return sources.survey(source, settings)[1], names(path, **data)


def test_what_is_left_out_is_counted_by_rule_and_ending(tmp_path):
    for name, size in {
        "a.txt": 1, "b.c": 10, "deep/c.c": 20, "d.html": 5, "Makefile": 3, "e.c.gz": 7,
        "tests/a.txt": 100, "deep/test/sub/b.py": 200, ".git/config": 4, "deep/.hidden": 5,
        ".own/test/x.txt": 6, "f.zip": 1, "f.zip.gz": 1,
    }.items():  # fmt: skip
        write(tmp_path, name, b"x" * size)
    (endings, excluded, hidden), read = left_out(tmp_path)
    assert read == ["a.txt"]
    assert endings.startswith("left out of web: 7 files, 47 bytes with other endings (")
    for part in (".c 2 files, 30 bytes", ".html 1 file, 5 bytes", ".c.gz 1 file, 7 bytes"):
        assert part in endings
    assert "no ending 1 file, 3 bytes" in endings and ".zip 1 file" in endings
    assert excluded.startswith("left out of web: 2 files, 300 bytes in directories of excluded")
    assert "tests 1 file, 100 bytes" in excluded and "test 1 file, 200 bytes" in excluded
    assert hidden.startswith("left out of web: 3 files, 15 bytes whose names")

    # The settings that are told have the files.
    def told(sentence, name):
        return ast.literal_eval(sentence.partition(f'--config.data.{name}="')[2].partition('"')[0])

    suffixes, exclude = told(endings, "suffixes"), told(excluded, "exclude")
    assert not {".zip", ".zip.gz", ""} & {*suffixes}
    more = ["b.c", "d.html", "deep/c.c", "deep/test/sub/b.py", "tests/a.txt"]
    write(tmp_path, "e.c.gz", gzip.compress(b"int"))
    (rest, hidden), read = left_out(tmp_path, suffixes=suffixes, exclude=exclude)
    assert read == sorted(["a.txt", "e.c.gz", *more])
    assert "3 files, 5 bytes with other endings" in rest
    (rest, _), read = left_out(tmp_path, suffixes=("",))
    assert "Makefile" in read and "excluded" in rest


def test_a_glob_tells_what_it_leaves_out_too(tmp_path):
    for name in ("a/x.c", "a/tests/y.c", "tests/z.c", "a/.z/x.c", "b/q.so", "b/r.txt"):
        write(tmp_path, name)
    (excluded, hidden), read = left_out(f"{tmp_path}/**/*.c")
    assert read == ["a/x.c"] and "2 files" in excluded and "1 file" in hidden
    (endings, excluded, _), read = left_out(f"{tmp_path}/*")
    assert read == ["b/r.txt"] and ".c 1 file" in endings and ".so 1 file" in endings
    assert "tests 2 files" in excluded


def test_only_regular_files_are_read(tmp_path):
    """Links that lead nowhere, loops, pipes, sockets and devices are named, and none is opened."""
    write(tmp_path, "d/a.txt")
    for name, target in {
        "gone.txt": "nowhere", "self.txt": "self.txt", "d/loop": "..", "null.txt": "/dev/null",
    }.items():  # fmt: skip
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(tmp_path, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/s.txt")  # a short path, whatever the folder's
        os.close(here)
        for path in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**/*.txt"):
            sentences, found = left_out(path)
            assert found == ["d/a.txt"]
            told = " ".join(sentences)
            for name in ("gone.txt", "self.txt"):
                assert f"{name}: a link that leads nowhere" in told
            for name in ("null.txt", "pipe.txt", "s.txt"):
                assert f"{name}: no regular file" in told
        for name in ("pipe.txt", "s.txt", "null.txt"):
            with pytest.raises(ValueError, match=rf"{name}' is no regular file"):
                read(tmp_path / name)
    with pytest.raises(ValueError, match=r"no file below.*gone\.txt: a link that leads nowhere"):
        read(f"{tmp_path}/*.txt")


@pytest.mark.parametrize("kind", ["text", "bytes", "jsonl", "parquet", "arrow", "array_record"])
def test_a_file_that_is_gone_is_named(tmp_path, kind):
    path = write(tmp_path, "a.txt", b"x")
    source, data = SourceConfig(path=str(path), kind=kind), DataConfig()
    unit = sources.Unit("0", kind, (str(path),), 0, -1, 1)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.txt is gone since the files were listed") as e:
        list(sources.read_unit(unit, source, data))
    assert "Errno" not in str(e.value)
    path.mkdir()
    if kind != "array_record":  # whose library says that it is damaged
        with pytest.raises(OSError, match=r"a\.txt cannot be read: Is a directory$"):
            list(sources.read_unit(unit, source, data))


def test_endings_of_formats_may_be_in_capitals(tmp_path):
    write(tmp_path, "A.JSONL.GZ", gzip.compress(lines({"text": "t", "id": "in lines"})))
    pq.write_table(pa.table({"text": ["t"], "id": ["in parquet"]}), tmp_path / "B.PARQUET")
    assert names(tmp_path) == ["in lines", "in parquet"]


def test_bytes_are_kept_as_they_are(tmp_path):
    data = gzip.compress(b"text")
    write(tmp_path, "a.txt.gz", data)
    write(tmp_path, "a.gz", data)
    assert read(tmp_path / "a.gz") == [[Document("a.gz", b"text")]]
    assert read(tmp_path / "a.gz", "bytes") == [[Document("a.gz", data)]]
    assert names(tmp_path) == names(tmp_path, "text") == ["a.txt.gz"]
    assert names(tmp_path, "bytes", suffixes=(".gz",)) == ["a.gz", "a.txt.gz"]
    [units] = read(tmp_path, "bytes", suffixes=(".gz",))
    assert {document.data for document in units} == {data}


def test_a_source_has_endings_of_its_own(tmp_path):
    for name in ("a.wav", "deep/b.wav", "c.txt", "d.png", "e.wav.gz"):
        write(tmp_path, name, b"RIFF\x10\x00\x00\x00WAVEdata")
    data = DataConfig()

    def found(kind, suffixes):
        source = SourceConfig("s", str(tmp_path), kind, suffixes=suffixes)
        return sorted(file.name for file in find_files(source, data).files)

    assert found("bytes", ()) == ["c.txt"]  # those of the corpus
    assert found("bytes", (".wav",)) == ["a.wav", "deep/b.wav"]
    assert found("text", (".wav",)) == ["a.wav", "deep/b.wav", "e.wav.gz"]
    assert found("bytes", ("",)) == ["a.wav", "c.txt", "d.png", "deep/b.wav", "e.wav.gz"]


def test_bytes_that_are_left_out_are_told_with_pictures_and_sounds(tmp_path):
    for name in ("a.wav", "b.png", "c.txt"):
        write(tmp_path, name)

    def told(kind, suffixes=()):
        source = SourceConfig("s", str(tmp_path), kind, suffixes=suffixes)
        return sources.survey(source, DataConfig())[1][0]

    assert ".wav" in told("bytes").partition("to have them: --config.data.suffixes=")[2]
    assert ".wav" not in told("text").partition("to have them: ")[2]  # it holds no text
    wanted = "to have them: \"'suffixes': ('.txt', '.png', '.wav')\" of this source"
    assert wanted in told("bytes", (".txt",)).replace("'.wav', '.png'", "'.png', '.wav'")
    nothing = SourceConfig("s", str(tmp_path), "bytes", suffixes=(".mid",))
    with pytest.raises(ValueError, match=r"ends in one of \.mid: give another path, kind or suff"):
        find_files(nothing, DataConfig())


def test_reasons_are_counted_and_are_one_line_each():
    bad = [Bad(f"a:{i}", "why\nnot") for i in range(3)] + [Bad("b\x1b", "other")]
    assert sources.grouped(bad) == ["a:0: why not (3 times)", "b\\x1b: other"]
    many = [Bad("a", f"reason {i}") for i in range(30)]
    files = [Bad(name, "a picture") for name in ("a.png", "b:c.png", "d.png")]
    assert sources.grouped(files) == ["a.png: a picture (3 times, also in b:c.png, d.png)"]
    assert len(sources.grouped(many)) == 11 and sources.grouped(many)[-1] == "and 20 more reasons"


def test_a_source_without_any_document_is_refused_with_the_field_to_name(tmp_path):
    write(tmp_path, "a.jsonl", lines(*[{"body": f"t{i}", "n": i} for i in range(50)]))
    source, data = SourceConfig("web", str(tmp_path)), DataConfig()

    def check(source, data):
        sources.refuse_without_document(sources.list_units(source, data), source, data)

    with pytest.raises(
        ValueError, match=r"none of the 50 records .*'web'.*'body', 'n' \(50 times"
    ) as e:
        check(source, data)
    assert "data.text_fields" in str(e.value) and "\n" not in str(e.value)
    check(source, DataConfig(text_fields=("body",)))
    check(SourceConfig("web", str(tmp_path), field="body"), data)
    write(tmp_path, "b.jsonl", lines({"text": "t"}))
    check(source, data)


def test_where_there_is_nothing_the_remedy_is_told(tmp_path):
    write(tmp_path, "a.so")
    with pytest.raises(FileNotFoundError, match=r"'web'.*nowhere.*existing file"):
        read("", source=SourceConfig("web", str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=rf"'auto'.*{tmp_path.name}.*\.jsonl\.zst.*\.py.*another"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"'arrow'.*one of \.arrow:.*another"):
        read(tmp_path, kind="arrow")
    with pytest.raises(ValueError, match=r"no file below.*\*\.c"):
        read(f"{tmp_path}/*.c")


def test_the_python_library_is_a_corpus():
    found = names("", shard_bytes=1_000_000)
    assert "argparse.py" in found and "json/decoder.py" in found
    assert not any("site-packages" in name or name.startswith("test/") for name in found)


def test_texts_are_grouped_and_order_follows_the_seed(tmp_path):
    for i in range(60):
        write(tmp_path, f"{i:02d}.txt", b"x" * 10)
    write(tmp_path, "large.txt", b"x" * 1000)
    units = read(tmp_path, shard_bytes=100)
    sizes = [sum(len(d.data) for d in unit) for unit in units]
    assert sum(sizes) == 1600 and sizes.count(1000) == 1
    assert sum(size == 100 for size in sizes) >= 5 and max(set(sizes) - {1000}) == 100
    order = [document.name for unit in units for document in unit]
    assert order != sorted(order)
    assert order == [d.name for unit in read(tmp_path, shard_bytes=10**9) for d in unit]
    assert order != [d.name for unit in read(tmp_path, seed=1) for d in unit]


def test_max_bytes_takes_the_first_files_of_the_order(tmp_path):
    for i in range(400):
        write(tmp_path, f"{i}.txt", b"x" * 10)
    everything = [d.name for unit in read(tmp_path) for d in unit]
    some = [d.name for unit in read(tmp_path, max_bytes=1000) for d in unit]
    assert some == everything[:100]
    assert [len(unit) for unit in read(tmp_path, max_bytes=1000, shard_bytes=300)] == [30, 30, 30]
    assert len(read(tmp_path, max_bytes=1)[0]) == 1
    # The sample must not be drawn by the hash of the split.
    held_out = [name for name in some if sources.is_held_out(name, 0.25, seed=0)]
    assert 10 < len(held_out) < 45


def test_max_bytes_cuts_lines_and_groups(tmp_path):
    records = [{"text": f"{i:04d}", "id": i} for i in range(1000)]
    write(tmp_path, "a.jsonl", lines(*records))
    size = (tmp_path / "a.jsonl").stat().st_size
    [unit] = read(tmp_path / "a.jsonl", max_bytes=size // 4)
    assert 240 < len(unit) < 260 and [d.name for d in unit] == [str(i) for i in range(len(unit))]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet", row_group_size=10)
    disk = pq.ParquetFile(tmp_path / "b.parquet").metadata.row_group(0).column(0)
    units = read(tmp_path / "b.parquet", max_bytes=10 * disk.total_compressed_size)
    assert 2 <= sum(map(len, units)) // 10 < 20


def test_each_format_is_cut_into_units_that_hold_every_record_once(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    records = [{"text": f"{i} " * 50, "sample_id": f"{i:03d}"} for i in range(300)]
    table = pa.Table.from_pylist(records)
    write(tmp_path, "lines/a.jsonl", lines(*records))
    for kind in ("parquet", "arrow", "array_record"):
        (tmp_path / kind).mkdir()
    pq.write_table(table, tmp_path / "parquet/a.parquet", row_group_size=20, compression="none")
    with pa.ipc.new_file(tmp_path / "arrow/a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    writer = ArrayRecordWriter(str(tmp_path / "array_record/a.array_record"), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()
    for kind in ("lines", "parquet", "arrow", "array_record"):
        source = SourceConfig(path=str(tmp_path / kind), field="text")
        units = read("", source=source, shard_bytes=16_000)
        assert len(units) > 2 and max(map(len, units)) < 200, kind
        expected = [(r["sample_id"], r["text"].encode()) for r in records]
        documents = [document for unit in units for document in unit]
        assert [(d.name, d.data) for d in documents] == expected, kind
        assert read("", source=source) == [documents], kind


def test_damaged_files_are_units_that_yield_a_bad(tmp_path):
    for name in ("a.parquet", "b.arrow", "c.array_record", "d.jsonl.gz", "e.jsonl.zst"):
        write(tmp_path, name, b"no such thing" * 10)
        write(tmp_path, f"empty/{name}", b"")
    for unit in read(tmp_path, shard_bytes=10):
        assert len(unit) == 1 and isinstance(unit[0], Bad), unit
        assert unit[0].name[0] in "abcde" and unit[0].reason


def preprocessed(path):
    entropies = pa.array([np.arange(3, dtype=np.float16)], pa.list_(pa.float16()))
    table = pa.table({"sample_id": ["s"], "text": ["t"], "entropies": entropies})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def test_an_unfinished_preprocessed_file_is_refused(tmp_path):
    for name in ("a.arrow", "b.arrow"):
        preprocessed(tmp_path / name)
    assert names(tmp_path) == ["s", "s"]
    write(tmp_path, "a.arrow.complete", b"")
    assert names(f"{tmp_path}/a*") == ["s"]
    with pytest.raises(ValueError, match=r"b\.arrow\.complete.*finish it, or delete"):
        read(tmp_path)
    write(tmp_path, "b.arrow", b"ARROW1 and no more")
    with pytest.raises(ValueError, match=r"b\.arrow\.complete"):
        read(tmp_path)
    write(tmp_path, "b.arrow.complete", b"")
    pa.ipc.new_file(tmp_path / "plain.arrow", pa.schema({"text": pa.string()})).close()
    assert names(tmp_path)[-1] == "s"


def test_a_local_hugging_face_dataset(tmp_path, monkeypatch):
    for setting in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(setting, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for i in range(3):
        write(tmp_path, f"d/{i}.jsonl", lines({"text": f"é{i}", "lang": "fr"}, {"text": None}))
    source = SourceConfig(path=str(tmp_path / "d"), kind="huggingface")
    units = read("", source=source)
    assert len(units) == 3
    for good, bad in units:
        assert good.name.startswith("train:") and good.language == "fr"
        assert bad.name.startswith("train:record ") and "NoneType" in bad.reason
    assert {unit[0].data.decode() for unit in units} == {"é0", "é1", "é2"}
    # Sizes are not known: a part of each of a few shards.
    [[only]] = read("", source=source, max_bytes=2)
    assert isinstance(only, Document)
    assert len(read("", source=source, max_bytes=8, shard_bytes=4)) == 2


def test_remote_paths(tmp_path, monkeypatch):
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class Bucket(LocalFileSystem):
        protocol = "s3"

        @classmethod
        def _strip_protocol(cls, path):
            path = os.fspath(path)
            return str(tmp_path / path[5:]) if path.startswith("s3://") else path.rstrip("/")

        def glob(self, path, **kwargs):
            return [p.removeprefix(f"{tmp_path}/") for p in super().glob(path, **kwargs)]

    fsspec.register_implementation("s3", Bucket, clobber=True)
    write(tmp_path, "bucket/web/a.txt")
    write(tmp_path, "bucket/web/deep/b.jsonl", lines({"text": "t"}, {"text": "u"}))
    pq.write_table(pa.table({"text": ["t"]}), tmp_path / "bucket/web/deep/c.parquet")
    expected = ["a.txt", "deep/b.jsonl:0", "deep/b.jsonl:14", "deep/c.parquet:0"]
    assert names("s3://bucket/web") == expected
    assert names("s3://bucket/*/*.txt") == ["web/a.txt"]
    with pytest.raises(FileNotFoundError, match="s3://bucket/none"):
        read("s3://bucket/none")
    with pytest.raises(ValueError, match=r"\*\* is for local paths"):
        read("s3://bucket/**/a")


MANY = [f"directory/file_{index}.py" for index in range(2000)]


@given(st.integers(0, 2**31), st.floats(0.01, 0.9))
def test_a_larger_fraction_only_adds(seed, fraction):
    held_out = {name for name in MANY[:100] if sources.is_held_out(name, fraction, seed)}
    assert held_out <= {n for n in MANY[:100] if sources.is_held_out(n, fraction + 0.1, seed)}


def test_the_split_keeps_its_fraction_and_follows_the_seed():
    held_out = [name for name in MANY if sources.is_held_out(name, 0.1, seed=0)]
    assert 150 < len(held_out) < 250
    assert held_out != [name for name in MANY if sources.is_held_out(name, 0.1, seed=1)]


def test_the_split_is_the_same_everywhere():
    held_out = [letter for letter in "abcdefgh" if sources.is_held_out(f"{letter}.py", 0.5, 7)]
    # blake2b("7:a.py") and so on; another list here would move every user's validation set.
    assert "".join(held_out) == "abcdgh"


@pytest.mark.parametrize(
    "name, encoded",
    [(os.fsdecode(b"caf\xe9.py"), b"caf\xe9.py"), ("\ud800 of JSON", b"\xed\xa0\x80 of JSON")],
)
def test_any_name_can_be_split(name, encoded):
    digest = hashlib.blake2b(b"0:" + encoded, digest_size=6).digest()
    fraction = int.from_bytes(digest, "big") / 2**48
    assert sources.is_held_out(name, fraction + 1e-9, seed=0)
    assert not sources.is_held_out(name, fraction, seed=0)


def test_file_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.py")
    try:
        write(tmp_path, name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert names(tmp_path) == [name]
