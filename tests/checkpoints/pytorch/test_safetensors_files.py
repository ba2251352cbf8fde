"""Safetensors files are read and written bit for bit, piece by piece; damaged ones are refused."""

import json
import math
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.checkpoints import lazy_arrays
from bltjax.checkpoints.pytorch import stored_array
from bltjax.checkpoints.pytorch.safetensors_files import open_safetensors, write_safetensors
from tests.weight_files import (
    ARRAYS,
    KINDS,
    LIBRARY_KINDS,
    assert_all_same,
    assert_honest,
    assert_same,
    damaged,
    named_arrays,
    random_array,
    shapes,
)

ROOT = Path(__file__).parents[3]


def put(path, header, data=b""):
    """A file of any header: bytes, or JSON values."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@given(
    shapes, st.sampled_from(KINDS), st.integers(0, 9), st.sampled_from([8, 50, 2**26]), st.data()
)
def test_pieces_equal_numpy(shape, kind, start, max_mapped, data):
    """Whatever the alignment, and with pieces larger than what is mapped at once."""
    whole = random_array(shape, kind)
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
    index = tuple(slice(*ends) for ends in bounds)
    with (
        tempfile.NamedTemporaryFile() as file,
        mock.patch.object(stored_array, "BLOCK_BYTES", max_mapped),
    ):
        file.write(bytes(start) + whole.tobytes())
        file.flush()
        array = stored_array.StoredArray(Path(file.name), start, shape, whole.dtype)
        assert_same(array[index], whole[index])
        assert_same(lazy_arrays.read_all(array), whole)


@settings(max_examples=30)
@given(named_arrays(LIBRARY_KINDS))
def test_files_of_the_library_are_read(arrays):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.safetensors"
        safetensors.numpy.save_file(arrays, path, metadata={"a": "b"})
        tensors = open_safetensors(path)
        assert_all_same(tensors, arrays)
        with safetensors.safe_open(path, framework="np") as library:
            starts = [tensors[name].start for name in tensors]
            assert starts == sorted(starts) and set(tensors) == set(library.keys())


@settings(max_examples=30)
@given(named_arrays(LIBRARY_KINDS), st.sampled_from([9, 64, 2**26]))
def test_the_library_reads_what_is_written(arrays, block_bytes):
    num_written = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.safetensors"
        with mock.patch.object(lazy_arrays.blocks, "__defaults__", (block_bytes, None)):
            write_safetensors(path, arrays, num_written.append)
        assert_all_same(safetensors.numpy.load_file(path), arrays)
        with safetensors.safe_open(path, framework="np") as library:
            assert library.metadata() == {"format": "pt"}
    assert sum(num_written) == sum(array.nbytes for array in arrays.values())
    assert max(num_written, default=0) <= block_bytes


@settings(max_examples=30)
@given(named_arrays())
def test_what_is_written_is_read_in_every_dtype(arrays):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.safetensors"
        write_safetensors(path, arrays)
        tensors = open_safetensors(path)
        assert_all_same(tensors, arrays)
        assert all(array.start % array.dtype.itemsize == 0 for array in tensors.values())
        assert [file.name for file in Path(directory).iterdir()] == [path.name]


def test_files_equal_the_librarys_byte_for_byte(tmp_path):
    arrays = {name: random_array((3, i)) for i, name in enumerate("cab")}
    arrays |= {"é": random_array((1,), "BF16"), "d": random_array((), "F64")}
    write_safetensors(tmp_path / "ours", arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_lazy_arrays_are_written_as_they_read(tmp_path):
    parts = [random_array((4, 3), seed=i) for i in range(3)]
    array = lazy_arrays.Joined(lazy_arrays.Stacked(parts))
    transposed = random_array((5, 7)).T
    write_safetensors(tmp_path / "a", {"x": array, "t": transposed})
    expected = {"x": np.concatenate(parts), "t": transposed}
    assert_all_same(safetensors.numpy.load_file(tmp_path / "a"), expected)


def test_an_array_that_reads_amiss_leaves_no_file(tmp_path):
    class Wrong:
        shape, dtype = (2, 3), np.dtype(np.float32)

        def __getitem__(self, index):
            return np.zeros((2, 3), np.float64)

    with pytest.raises(ValueError, match="'w' gave float64"):
        write_safetensors(tmp_path / "a.safetensors", {"w": Wrong()})
    assert not (tmp_path / "a.safetensors").exists()


def test_a_run_of_rows_is_one_reading_of_its_bytes(tmp_path):
    write_safetensors(tmp_path / "a", {"x": random_array((10, 4, 5))})
    array = open_safetensors(tmp_path / "a")["x"]
    with mock.patch.object(stored_array.np, "memmap", wraps=np.memmap) as memmap:
        array[slice(3, 6), slice(0, 4), slice(0, 5)]
    (call,) = memmap.call_args_list
    assert call.args[3:] == (array.start + 3 * 80, (3 * 80,))


def test_no_more_than_a_block_is_mapped(tmp_path):
    whole = random_array((10, 4, 5))
    write_safetensors(tmp_path / "a", {"x": whole})
    array = open_safetensors(tmp_path / "a")["x"]
    with (
        mock.patch.object(stored_array.np, "memmap", wraps=np.memmap) as memmap,
        mock.patch.object(stored_array, "BLOCK_BYTES", 200),
    ):
        assert_same(array[:, 1:2, :], whole[:, 1:2, :])
    sizes = [call.args[4][0] for call in memmap.call_args_list]
    assert max(sizes) <= 200 and len(sizes) <= 10


def test_only_steps_of_one_are_read(tmp_path):
    write_safetensors(tmp_path / "a", {"x": random_array((10,))})
    with pytest.raises(ValueError, match="step 1"):
        open_safetensors(tmp_path / "a")["x"][slice(0, 10, 2),]


def test_threads_share_an_array(tmp_path):
    whole = random_array((500, 40))
    write_safetensors(tmp_path / "a", {"x": whole})
    array = open_safetensors(tmp_path / "a")["x"]
    with ThreadPoolExecutor(8) as pool:
        rows = pool.map(lambda i: array[slice(i, i + 1), slice(0, 40)], range(500))
        assert_same(np.concatenate(list(rows)), whole)


MEASURE = """
import sys
from pathlib import Path
from bltjax.checkpoints import lazy_arrays as lazy
from bltjax.checkpoints.pytorch.safetensors_files import open_safetensors

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

before = peak()
array = open_safetensors(Path(sys.argv[1]))["x"]
array[slice(40_000, 40_001), slice(0, 1024)]
array[slice(0, 100), slice(0, 1024)]
after_row = peak()
for index in lazy.blocks(array, 2**20):
    array[index]
print(after_row - before, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_reading_pieces_takes_the_memory_of_a_piece(tmp_path):
    shape, path = [50_000, 1024], tmp_path / "sparse.safetensors"
    size = 4 * math.prod(shape)
    assert size > 200 * 10**6
    put(path, {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    assert path.stat().st_blocks * 512 < 10**6
    command = [sys.executable, "-c", MEASURE, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    row, everything = map(int, result.stdout.split())
    assert row < 30 * 10**6
    assert everything < 30 * 10**6


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_safetensors(tmp_path / "none.safetensors")


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header, data",
    [
        ({"a": F32}, b"123"),
        ({"a": F32}, b"12345"),
        ({"a": F32, "b": F32}, b"1234"),
        ({"a": {**F32, "shape": [2]}}, b"1234"),
        ({"a": {**F32, "shape": [-1]}}, b"1234"),
        ({"a": {**F32, "shape": [0] * 70, "data_offsets": [0, 0]}}, b""),
        ({"a": {**F32, "shape": [0, 2**62], "data_offsets": [0, 0]}}, b""),
        ({"a": {**F32, "dtype": "F31"}}, b"1234"),
        ({"a": 1}, b""),
        ([], b""),
        (b"[" * 100_000, b""),
        (b"\xff\xfe", b""),
        (b"", b""),
    ],
    ids=str,
)
def test_malformed_files_are_refused(tmp_path, header, data):
    path = tmp_path / "a.safetensors"
    put(path, header, data)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a whole.*download") as raised:
        open_safetensors(path)
    assert len(str(raised.value).splitlines()) == 1


def test_other_things_than_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "empty"):
        (tmp_path / "empty").touch()
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            open_safetensors(path)


def test_a_dtype_that_numpy_lacks_is_named(tmp_path):
    put(tmp_path / "a", {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1")
    with pytest.raises(ValueError, match=r"^tensor 'w' of .*a has dtype F4.*convert"):
        open_safetensors(tmp_path / "a")


def test_damaged_headers_give_an_error_or_the_tensors(tmp_path):
    write_safetensors(tmp_path / "whole", ARRAYS)
    whole = (tmp_path / "whole").read_bytes()
    header = range(len(whole) - sum(array.nbytes for array in ARRAYS.values()))
    num_refused = 0
    for seed in range(400):
        (tmp_path / "a").write_bytes(damaged(whole, seed, [header]))
        try:
            assert_honest(open_safetensors(tmp_path / "a"))
        except ValueError as error:
            assert str(tmp_path / "a") in str(error)
            num_refused += 1
    assert 250 < num_refused < 400


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 50, -1])
def test_truncated_files_are_refused(tmp_path, cut):
    write_safetensors(tmp_path / "a", ARRAYS)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:cut])
    with pytest.raises(ValueError, match="not a whole"):
        open_safetensors(tmp_path / "a")
