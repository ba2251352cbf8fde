"""Small files that claim to be large: told by names, shapes and sizes, before any value."""

import json

import numpy as np
import pytest

from bltjax.checkpoints import formats
from bltjax.checkpoints.lazy_arrays import blocks, read_all
from bltjax.checkpoints.pytorch.pth_files import open_pth
from bltjax.checkpoints.pytorch.safetensors_files import open_safetensors
from bltjax.checkpoints.weights import WeightsError
from tests import directories
from tests.checkpoints.test_regular_files import no_hang
from tests.pth_files import plain, put_pth, tensor

FLOATS = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
    "shape, strides",
    [
        ((2**40,), (0,)),
        ((2**20, 2**20), (0, 0)),
        ((2, 2**30), (1, 0)),
        ((2**12, 3), (0, 1)),
        ((1000,), (0,)),
    ],
    ids=str,
)
def test_views_that_repeat_their_storage_without_end_are_refused(tmp_path, shape, strides):
    path = put_pth(tmp_path, tensor("Float", "0", 6, 0, shape, strides) + b".", [FLOATS])
    with no_hang(), pytest.raises(ValueError, match=r"refused tensors of [\d,]+ bytes.*clones"):
        open_pth(path)


def test_one_tensor_under_many_names_is_refused_where_it_is_too_much(tmp_path):
    one = tensor("Float", "0", 6, 0, (6,), (1,)) + b"q\x05"
    names = b"".join(plain(f"a{i}") + (one if i == 0 else b"h\x05") for i in range(65))
    with pytest.raises(ValueError, match=r"refused tensors of 1,560 bytes.*storages have 24"):
        open_pth(put_pth(tmp_path, b"\x80\x02}(" + names + b"u.", [FLOATS]))


def test_views_that_repeat_a_little_are_read(tmp_path):
    """As tied layers and expanded constants are."""
    program = tensor("Float", "0", 6, 0, (10, 6), (0, 1)) + b"."
    array = open_pth(put_pth(tmp_path, program, [FLOATS]))
    np.testing.assert_array_equal(read_all(array), np.tile(FLOATS, (10, 1)))


@pytest.mark.parametrize("stride", [2**62, 2**63, 2**70, 2**200])
def test_strides_of_axes_of_length_one_do_not_matter(tmp_path, stride):
    program = tensor("Float", "0", 6, 0, (1, 6), (stride, 1)) + b"."
    array = open_pth(put_pth(tmp_path, program, [FLOATS]))
    np.testing.assert_array_equal(read_all(array), FLOATS[None])


@pytest.mark.parametrize("shape", [(2**60, 0), (0, 2**60), (2**31, 2**31, 0), (0,)])
def test_nothing_is_covered_by_no_blocks(shape):
    class Empty:
        dtype = np.dtype(np.float32)

    Empty.shape = shape
    with no_hang():
        assert list(blocks(Empty())) == []


def test_tensors_without_a_place_are_not_read(tmp_path):
    """Misshapen and unexpected ones are named without looking inside."""
    source = directories.hub(tmp_path / "source", "meta_entropy")

    def change(found):
        found["norm.weight"] = np.zeros(2**20, np.float32)
        found["stray.weight"] = np.zeros(2**21, np.float32)
        found["output.weight"].flat[3] = np.nan

    directories.rewrite(source, change)
    told: list[int] = []
    with pytest.raises(WeightsError) as raised:
        formats.read(source, on_progress=told.append)
    assert sum(told) < 2**20
    for wanted in (
        "norm.weight has shape [1048576], the config says [48]",
        "stray.weight is unexpected",
        "output.weight has 1 values that are NaN",
    ):
        assert wanted in str(raised.value)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header, data",
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2 + b'"b":0}', b"1234"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"1234",
        ),
        ({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, b"123456"),  # overlapping
        ({"a": F32, "b": {**F32, "data_offsets": [8, 12]}}, b"1" * 12),  # a hole
        ({"a": {**F32, "data_offsets": [4, 0]}}, b"1234"),
        ({"a": {**F32, "data_offsets": [-4, 0]}}, b"1234"),
        ({"a": {**F32, "data_offsets": [2**64, 2**64 + 4]}}, b"1234"),
        ({"a": {**F32, "shape": [2**40]}}, b"1234"),
        ({"a": {**F32, "shape": [2**32, 2**32]}}, b"1234"),
        ({"a": {**F32, "shape": [2**62, 2**2 + 1]}}, b"1234"),
        ({"a": {**F32, "shape": [1.5]}}, b"1234"),
        ({"a": {**F32, "dtype": "F128"}}, b"1234"),
        (b'{"a":' * 100_000, b""),
    ],
    ids=lambda value: str(value)[:60],
)
def test_headers_that_lie_are_refused(tmp_path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with no_hang(), pytest.raises(ValueError, match="is not a whole safetensors file"):
        open_safetensors(tmp_path / "a")


@pytest.mark.parametrize("length", [2**16, 2**25, 2**40, 2**63, 2**64 - 1])
def test_headers_longer_than_their_file_or_than_any_model_needs_are_refused(tmp_path, length):
    with (tmp_path / "a").open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(2**26 if length == 2**25 else 100)
    with no_hang(), pytest.raises(ValueError, match=f"its header would have {length} bytes"):
        open_safetensors(tmp_path / "a")


def test_messages_are_bounded_and_steer_no_terminal():
    problems = [f"layer.{i}\x1b[31m\n\ud800 is missing" for i in range(5000)]
    error = WeightsError("dir", problems)
    lines = str(error).splitlines()
    assert error.problems == problems and len(lines) == 102
    assert lines[0] == "dir: 5000 problems" and lines[-1] == "  - and 4900 more"
    assert str(WeightsError("dir", ["a is missing"])) == "dir: a is missing"
    assert "\x1b" not in str(error)
    str(error).encode()


def test_a_file_without_names_of_tensors_is_one_problem(tmp_path):
    source = directories.hub(tmp_path / "source", "meta_entropy")
    (source / "model.safetensors").unlink()
    path = put_pth(source, tensor("Float", "0", 6, 0, (6,), (1,)) + b".", [FLOATS])
    with pytest.raises(WeightsError) as raised:
        formats.read(source)
    said = f"{path.name} has no tensors by name: save model.state_dict()"
    assert raised.value.problems == [said]
