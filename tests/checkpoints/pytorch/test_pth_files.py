"""Files of torch.save are read bit for bit without torch; damage never passes for weights."""

import math
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.checkpoints import lazy_arrays
from bltjax.checkpoints.pytorch import pth_files
from bltjax.checkpoints.pytorch.pth_files import open_pth, verify
from tests.pth_files import STORAGES, assert_trees_same, plain, put_pth, read, tensor
from tests.weight_files import assert_same, damaged, random_array

# Made with torch.save of torch 2.13. "state" is {"model": the state_dict of a Sequential of a
# Linear(3, 2) and an Embedding(4, 3), "optim": ..., "step": 7}; "views" is a list of views of one
# bfloat16 tensor, an expanded one, a Parameter, booleans and an empty tensor; "legacy" is a state
# saved with _use_new_zipfile_serialization=False.
FIXTURES = Path(__file__).parents[2] / "golden_data" / "pth"


def floats(start, *shape):
    return (np.arange(math.prod(shape)) + start).reshape(shape).astype(np.float32)


BASE = np.arange(24).reshape(4, 6).astype(ml_dtypes.bfloat16)
EXPECTED = {
    "state.pth": {
        "model": {
            "0.weight": floats(0, 2, 3),
            "0.bias": floats(100, 2),
            "1.weight": floats(200, 4, 3),
        },
        "optim": {
            "state": {0: {"step": np.array(7), "exp_avg": floats(0, 2, 3) / 8}},
            "param_groups": [
                dict(lr=0.25, betas=(0.9, 0.95), params=[0, 1, 2], name=None, fused=True)
            ],
        },
        "step": 7,
    },
    "views.pth": [
        BASE,
        BASE[1:, ::2],
        BASE.T,
        np.arange(3, dtype=np.int16)[:, None].repeat(4, axis=1),
        np.arange(4, dtype=np.float16),
        np.array([True, False]),
        np.zeros((0, 5)),
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_files_of_torch_are_read_without_it(name):
    sizes = []
    tree = open_pth(FIXTURES / name)
    assert_trees_same(read(tree), EXPECTED[name])
    assert verify(FIXTURES / name, sizes.append) == []
    with zipfile.ZipFile(FIXTURES / name) as archive:
        assert sum(sizes) == sum(i.file_size for i in archive.infolist() if "/data/" in i.filename)
    if name == "state.pth":
        assert type(tree["model"]) is OrderedDict


def test_the_format_before_zip_files_is_named():
    for function in (open_pth, verify):
        with pytest.raises(ValueError, match=r"legacy\.pth has the format of torch before.*save"):
            function(FIXTURES / "legacy.pth")


@st.composite
def views(draw):
    """(kind, elements of the storage, offset, shape, strides) inside the storage."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [draw(st.integers(0, 12)) for _ in shape]
    offset = draw(st.integers(0, 5))
    reach = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    numel = 1 + draw(st.integers(0, 3)) + (0 if 0 in shape else reach)
    return draw(st.sampled_from(sorted(STORAGES))), numel, offset, tuple(shape), tuple(strides)


@settings(max_examples=60)
@given(st.lists(views(), min_size=1, max_size=3), st.data())
def test_views_equal_numpys(all_views, data):
    storages = [random_array((view[1],), STORAGES[view[0]], i) for i, view in enumerate(all_views)]
    program = b"".join(tensor(view[0], str(i), *view[1:]) for i, view in enumerate(all_views))
    with tempfile.TemporaryDirectory() as directory:
        path = put_pth(Path(directory), b"(" + program + b"t.", storages)
        for array, storage, view in zip(open_pth(path), storages, all_views, strict=True):
            _, _, offset, shape, strides = view
            steps = [step * storage.itemsize for step in strides]
            start = storage[min(offset, len(storage) - 1) :]
            expected = np.lib.stride_tricks.as_strided(start, shape, steps)
            assert_same(lazy_arrays.read_all(array), expected)
            ends = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
            index = tuple(slice(*pair) for pair in ends)
            assert_same(array[index], expected[index])


@pytest.mark.parametrize(
    "numel, offset, shape, strides",
    [
        (6, 1, (2, 3), (3, 1)),
        (6, 0, (2, 3), (4, 1)),
        (6, 0, (7,), (1,)),
        (6, 6, (), ()),
        (6, -1, (2,), (1,)),
        (6, 0, (-2,), (1,)),
        (6, 5, (2,), (-1,)),
        (6, 0, (2, 3), (1,)),
        (6, 0, (2.0,), (1,)),
        (6, 1.0, (2,), (1,)),
        (6, 0, (2,), (1.0,)),
        (6, 0, (True,), (1,)),
        (6, 0, (10**30,), (0,)),
        (6, 0, (0, 2**80), (1, 1)),
        (6, 0, (1,) * 70, (1,) * 70),
        (6, 2**70, (1,), (1,)),
        (7, 0, (1,), (1,)),  # the storage has 6
        (-1, 0, (1,), (1,)),
        (2**62, 0, (1,), (1,)),
        ("6", 0, (1,), (1,)),
    ],
    ids=str,
)
def test_tensors_outside_their_storage_are_refused(tmp_path, numel, offset, shape, strides):
    program = tensor("Float", "0", numel, offset, shape, strides) + b"."
    path = put_pth(tmp_path, program, [floats(0, 6)])
    with pytest.raises(ValueError, match=r"a\.pth is not a whole torch\.save file .*download"):
        open_pth(path)


def test_a_storage_that_is_not_there(tmp_path):
    path = put_pth(tmp_path, tensor("Float", "1", 1, 0, (), ()) + b".", [floats(0, 6)])
    with pytest.raises(ValueError, match="storage '1' is missing"):
        open_pth(path)


def rezip(path, change=lambda info: None, rename=str, extra=(), **options):
    """Writes a fixture's entries anew to `path`, changed."""
    with zipfile.ZipFile(FIXTURES / "views.pth") as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            entry = zipfile.ZipInfo(rename(info.filename))
            change(entry)
            new.writestr(entry, old.read(info))
        for name, data in extra:
            new.writestr(name, data)
    return path


@pytest.mark.parametrize("top", ["x", "é", "a b"])
def test_archives_may_have_any_top_folder_and_no_byte_order(tmp_path, top):
    def rename(name):
        return f"{top}/order" if name == "views/byteorder" else name.replace("views", top)

    extra = [(f"{top}/other/data.pkl", b""), ("data.pkl", b"")]
    path = rezip(tmp_path / "a.pth", rename=rename, extra=extra)
    assert_trees_same(read(open_pth(path)), EXPECTED["views.pth"])
    assert verify(path) == []
    path.write_bytes(b"something before" + path.read_bytes())  # which zip files may have
    assert_trees_same(read(open_pth(path)), EXPECTED["views.pth"])


def compress(ending):
    def change(info):
        if info.filename.endswith(ending):
            info.compress_type = zipfile.ZIP_DEFLATED

    return change


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"change": compress("data/0")}, "'views/data/0' is compressed or"),
        ({"change": compress("data.pkl")}, "'views/data.pkl' is compressed"),
        ({"rename": lambda name: name.replace("data.pkl", "pkl")}, "no data.pkl"),
        ({"extra": [("other/data.pkl", b"N.")]}, "no data.pkl"),
        ({"extra": [("views/data/0", b"")]}, "two entries have one name"),
    ],
)
def test_other_archives_are_refused(tmp_path, changes, message):
    path = rezip(tmp_path / "a.pth", **changes)
    with pytest.raises(ValueError, match=rf"a\.pth is not a whole.*{message}"):
        open_pth(path)


def test_big_endian_files_are_refused(tmp_path):
    def rename(name):
        return "views/old" if name == "views/byteorder" else name

    path = rezip(tmp_path / "a.pth", rename=rename, extra=[("views/byteorder", b"big")])
    with pytest.raises(ValueError, match="byte order b'big': save it on a little-endian"):
        open_pth(path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({8: 1}, "encrypted"),
        ({10: 8}, "compressed"),
        ({20: 2200}, "compressed"),
        ({20: 2200, 24: 2200}, "overlap"),
        ({20: 9000, 24: 9000}, "past the file"),
    ],
)
def test_directories_that_lie_are_refused(tmp_path, fields, message):
    path = put_pth(tmp_path, b"N.", [random_array((1000,), "U8")] * 2)
    whole = bytearray(path.read_bytes())
    entry = whole.rindex(b"a/data/0") - 46
    assert whole[entry:].startswith(b"PK\1\2")
    for at, value in fields.items():
        whole[entry + at : entry + at + 2] = value.to_bytes(2, "little")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=message):
        open_pth(path)


@pytest.mark.parametrize("at", [0, 30])
def test_entries_are_where_their_header_is(tmp_path, at):
    path = put_pth(tmp_path, b"N.", [random_array((9,), "U8")])
    whole = bytearray(path.read_bytes())
    header = whole.index(b"a/data/0") - 30
    assert whole[header:].startswith(b"PK\3\4")
    whole[header + at] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="'a/data/0' is not where the directory has it"):
        open_pth(path)


def test_a_pickle_beyond_reason_is_refused(tmp_path):
    path = put_pth(tmp_path, plain("x" * 1000) + b".", [])
    with (
        mock.patch.object(pth_files, "MAX_PICKLE_BYTES", 1000),
        pytest.raises(ValueError, match=r"has 10.. bytes, over 1000"),
    ):
        open_pth(path)


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"hello", bytes(1000), b"\x80\x02}."], ids=str)
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "a.pth").write_bytes(data)
    for path in (tmp_path / "a.pth", tmp_path):
        for function in (open_pth, verify):
            with pytest.raises(ValueError, match=r"is not a whole torch\.save file"):
                function(path)


def test_a_missing_file_is_missing(tmp_path):
    for function in (open_pth, verify):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "none.pth")


def test_damaged_storages_are_told(tmp_path):
    with zipfile.ZipFile(FIXTURES / "views.pth") as archive:
        start = archive.getinfo("views/data/1").header_offset
    whole = bytearray((FIXTURES / "views.pth").read_bytes())
    at = whole.index(bytes([0, 0, 1, 0, 2, 0]), start)
    whole[at] ^= 4
    (tmp_path / "a.pth").write_bytes(whole)
    open_pth(tmp_path / "a.pth")
    with mock.patch.object(pth_files, "BLOCK_BYTES", 5):
        (problem,) = verify(tmp_path / "a.pth")
        assert verify(FIXTURES / "views.pth") == []
    assert "a.pth: storage '1' is damaged" in problem and "download" in problem


def test_damaged_files_give_an_error_a_problem_or_the_tensors(tmp_path):
    """With `verify`, no damage passes, wherever it is."""
    num_passed = 0
    for name, expected in EXPECTED.items():
        whole = (FIXTURES / name).read_bytes()
        directory = range(whole.index(b"PK\1\2"), len(whole))
        for seed in range(250):
            path = tmp_path / "a.pth"
            path.write_bytes(damaged(whole, seed, [range(len(whole)), directory]))
            try:
                tree = open_pth(path)
                problems = verify(path)
            except ValueError as error:
                assert str(path) in str(error)
                continue
            if not problems:
                assert_trees_same(read(tree), expected)
                num_passed += 1
    assert 50 < num_passed < 250  # padding, times and names that nobody reads
