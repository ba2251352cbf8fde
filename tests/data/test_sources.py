"""Files are found in one order, read as bytes, and split by name."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax.data import sources
from bltjax.data.sources import Document


def write(root, name, data=b"x"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def names(root, paths):
    return [path.relative_to(root).as_posix() for path in paths]


def test_lists_by_path_components_and_suffix(tmp_path):
    for name in ("b.py", "a/z.txt", "a/b/c.md", "a.py", "a-b/c.py", "skip.so", "py"):
        write(tmp_path, name)
    # As strings "a-b/c.py" and "a.py" would come before "a/...".
    expected = ["a/b/c.md", "a/z.txt", "a-b/c.py", "a.py", "b.py"]
    assert names(tmp_path, sources.list_text_files(tmp_path)) == expected
    assert names(tmp_path, sources.list_text_files(str(tmp_path), suffixes=[".so"])) == ["skip.so"]


def test_does_not_enter_excluded_directories(tmp_path):
    for name in ("site-packages/a.py", "x/tests/deep/b.py", "test/c.py", "tests.py", "own/d.py"):
        write(tmp_path, name)
    assert names(tmp_path, sources.list_text_files(tmp_path)) == ["own/d.py", "tests.py"]
    chosen = sources.list_text_files(tmp_path, exclude={"own", "x", "site-packages"})
    assert names(tmp_path, chosen) == ["test/c.py", "tests.py"]


def test_follows_links_to_files_below_root_only(tmp_path):
    root = tmp_path / "root"
    write(root, "store/blob", b"inside")
    write(tmp_path, "elsewhere/secret.py", b"outside")
    (root / "link.py").symlink_to("store/blob")
    (root / "leaves.py").symlink_to(tmp_path / "elsewhere/secret.py")
    (root / "directory").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    assert sources.read_documents(root) == [Document("link.py", b"inside")]
    (tmp_path / "alias").symlink_to(root)
    assert sources.read_documents(tmp_path / "alias") == [Document("link.py", b"inside")]


def test_reads_any_bytes_and_skips_empty_files(tmp_path):
    data = bytes(range(256)) + b"\r\n\xff\xfe\x00"
    write(tmp_path, "a/b.py", data)
    write(tmp_path, "a/empty.py", b"")
    assert sources.read_documents(tmp_path) == [Document("a/b.py", data)]


def test_max_bytes_keeps_whole_files_in_order(tmp_path):
    for name in ("a.py", "b.py", "c.py"):
        write(tmp_path, name, b"1234")
    read = [document.name for document in sources.read_documents(tmp_path, max_bytes=11)]
    assert read == ["a.py", "b.py"]
    assert len(sources.read_documents(tmp_path, max_bytes=12)) == 3
    with pytest.raises(ValueError, match="max_bytes=3"):
        sources.read_documents(tmp_path, max_bytes=3)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*existing directory"):
        sources.read_documents(tmp_path / "nowhere")


def test_no_matching_file_names_root_and_suffixes(tmp_path):
    write(tmp_path, "a.py", b"")
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*\('.py',\).*choose"):
        sources.read_documents(tmp_path, suffixes=(".py",))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, "a.py")
    (tmp_path / "broken.py").symlink_to("not-fetched")
    with pytest.raises(OSError, match=r"broken\.py"):
        sources.read_documents(tmp_path)


def test_a_directory_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a.py")
    write(tmp_path, "closed/b.py")
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)  # Modes do not stop root, who may run the tests.
    with pytest.raises(PermissionError, match="closed"):
        sources.read_documents(tmp_path)


def test_the_python_library_is_a_corpus():
    root = sources.python_library_root()
    found = names(root, sources.list_text_files(root))
    assert "argparse.py" in found and "json/decoder.py" in found
    assert not any("site-packages" in name or name.startswith("test/") for name in found)


MANY = [Document(f"directory/file_{index}.py", b"x") for index in range(2000)]


@given(st.sets(st.integers(0, 1999), min_size=200), st.integers(0, 2**31))
def test_a_document_never_changes_sides(kept, seed):
    train, validation = sources.split_by_file(MANY, 0.3, seed)
    fewer = [MANY[index] for index in sorted(kept)]
    fewer_train, fewer_validation = sources.split_by_file(fewer, 0.3, seed)
    assert set(fewer_train) == set(train) & set(fewer)
    assert set(fewer_validation) == set(validation) & set(fewer)


def test_the_split_keeps_its_fraction_and_follows_the_seed():
    train, validation = sources.split_by_file(MANY, 0.1, seed=0)
    held_out = set(validation)
    assert validation == [document for document in MANY if document in held_out]
    assert train == [document for document in MANY if document not in held_out]
    assert 150 < len(validation) < 250
    assert held_out != set(sources.split_by_file(MANY, 0.1, seed=1)[1])
    assert held_out < set(sources.split_by_file(MANY, 0.2, seed=0)[1])


def test_the_split_is_the_same_everywhere():
    documents = [Document(f"{letter}.py", b"x") for letter in "abcdefgh"]
    _, validation = sources.split_by_file(documents, 0.5, seed=7)
    # blake2b("7:a.py") and so on; another list here would move every user's validation set.
    assert "".join(document.name[0] for document in validation) == "abcdgh"


def test_a_name_that_is_not_utf8_can_be_split():
    odd = Document(os.fsdecode(b"caf\xe9.py"), b"x")
    train, validation = sources.split_by_file([odd, *MANY], 0.5, seed=0)
    assert odd in train + validation


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 35])
def test_a_fraction_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(ValueError, match=f"validation_fraction={fraction} must lie"):
        sources.split_by_file(MANY, fraction, seed=0)


@pytest.mark.parametrize(
    "fraction, counts", [(1e-9, "2000 train and 0"), (1 - 1e-9, "0 train and")]
)
def test_an_empty_side_is_refused(fraction, counts):
    with pytest.raises(ValueError, match=f"{counts}.*change the fraction"):
        sources.split_by_file(MANY, fraction, seed=0)
