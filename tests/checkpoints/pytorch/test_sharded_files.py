"""Directories of weights keep their tensors; all that is wrong with one is told at once."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.checkpoints.pytorch.safetensors_files import (
    INDEX,
    SINGLE,
    open_sharded,
    write_safetensors,
    write_sharded,
)
from tests.weight_files import (
    ARRAYS,
    LIBRARY_KINDS,
    assert_all_same,
    assert_honest,
    damaged,
    named_arrays,
)


@settings(max_examples=30)
@given(named_arrays(LIBRARY_KINDS), st.integers(1, 400))
def test_shards_keep_order_and_the_limit(arrays, max_bytes):
    with tempfile.TemporaryDirectory() as name:
        directory, num_written = Path(name) / "new", []
        write_sharded(directory, arrays, num_written.append, max_bytes)
        tensors, problems = open_sharded(directory)
        assert problems == []
        assert_all_same(tensors, arrays)
        assert sum(num_written) == sum(array.nbytes for array in arrays.values())
        files = {file.name for file in directory.iterdir()}
        if files == {SINGLE}:
            assert sum(num_written) <= max_bytes or sum(a.size > 0 for a in arrays.values()) == 1
            return
        index = json.loads((directory / INDEX).read_text())
        assert index["metadata"] == {"total_size": sum(num_written)}
        assert list(index["weight_map"]) == list(arrays)
        shards = list(dict.fromkeys(index["weight_map"].values()))
        num = len(shards)
        assert shards == [f"model-{i + 1:05d}-of-{num:05d}.safetensors" for i in range(num)]
        assert files == {*shards, INDEX}
        before = math.inf
        for shard in shards:
            sizes = [arrays[name].nbytes for name, at in index["weight_map"].items() if at == shard]
            assert sum(sizes) <= max_bytes or np.count_nonzero(sizes) == 1
            assert before + sizes[0] > max_bytes  # else it belongs to the one before
            before = sum(sizes)


def test_transformers_names_of_shards(tmp_path):
    write_sharded(tmp_path, ARRAYS, max_shard_bytes=50)
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 48 + 24 + 12 + 8},
        "weight_map": {
            "layers.0.weight": "model-00001-of-00002.safetensors",
            "layers.1.weight": "model-00002-of-00002.safetensors",
            "norm": "model-00002-of-00002.safetensors",
            "step": "model-00002-of-00002.safetensors",
        },
    }


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path):
    """A sound directory of two shards: one tensor in the first, three in the second."""
    write_sharded(tmp_path, ARRAYS, max_shard_bytes=50)
    assert_all_same(open_sharded(tmp_path)[0], ARRAYS)
    return tmp_path


def change_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def assert_problems(directory, lost, *patterns):
    """Each problem is one line that has its pattern; all tensors but `lost` are sound."""
    tensors, problems = open_sharded(directory)
    expected = {name: array for name, array in ARRAYS.items() if name not in lost}
    assert_all_same(tensors, expected)
    assert len(problems) == len(patterns), problems
    for problem, pattern in zip(problems, patterns, strict=True):
        assert pattern in problem and len(problem.splitlines()) == 1
        problem.encode()  # can be printed


def test_a_directory_without_weights(tmp_path):
    assert_problems(tmp_path, ARRAYS, f"{tmp_path} has no weights")
    assert_problems(tmp_path / "none", ARRAYS, "has no weights")


def test_a_single_file(tmp_path):
    write_safetensors(tmp_path / SINGLE, ARRAYS)
    assert_problems(tmp_path, [])
    (tmp_path / SINGLE).write_bytes(b"x")
    assert_problems(tmp_path, ARRAYS, "not a whole safetensors file")


def test_the_index_goes_before_a_single_file(sharded):
    (sharded / SINGLE).write_bytes(b"x")
    assert_problems(sharded, [])


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": null}}',
        b"[" * 100_000,
        b'{"weight_map":' * 100_000,
    ],
    ids=lambda index: index[:20],
)
def test_a_malformed_index(sharded, index):
    (sharded / INDEX).write_bytes(index)
    assert_problems(sharded, ARRAYS, "is no index")


@pytest.mark.parametrize(
    "file",
    [f"../{FIRST}", f"/{FIRST}", f"sub/{FIRST}", "..", ".", "", "a\\b", "a\0b", "C:a", "a\nb/"],
)
def test_files_outside_the_directory_are_refused(sharded, file):
    for place in (sharded.parent, sharded / "sub"):
        place.mkdir(exist_ok=True)
        (place / FIRST).write_bytes((sharded / FIRST).read_bytes())
    change_index(sharded, lambda weight_map: weight_map.update({"layers.0.weight": file}))
    assert_problems(sharded, ["layers.0.weight"], f"names {file!r}: refused")


def test_odd_names_of_files_are_problems(sharded):
    for file in ("x" * 5000, "\ud800"):
        change_index(sharded, lambda weight_map, file=file: weight_map.update({"norm": file}))
        tensors, problems = open_sharded(sharded)
        assert "norm" not in tensors and len(problems) == 2
        for problem in problems:
            problem.encode()


def test_a_missing_shard_is_one_problem(sharded):
    (sharded / SECOND).unlink()
    lost = [name for name in ARRAYS if name != "layers.0.weight"]
    assert_problems(sharded, lost, f"{SECOND!r} is missing")


def test_a_damaged_shard_is_one_problem(sharded):
    (sharded / FIRST).write_bytes((sharded / FIRST).read_bytes()[:-1])
    assert_problems(sharded, ["layers.0.weight"], f"{FIRST} is not a whole safetensors file")


def test_all_problems_are_told(sharded):
    def change(weight_map):
        weight_map["norm"] = FIRST  # it is in the second
        weight_map["absent"] = SECOND
        del weight_map["step"]
        weight_map["lost\ud800"] = "gone"

    change_index(sharded, change)
    assert_problems(
        sharded,
        ["norm", "step"],
        "'gone' is missing",
        f"{FIRST!r} lacks tensor 'norm'",
        f"{SECOND!r} lacks tensor 'absent'",
        f"{SECOND!r} has tensor 'step', which {INDEX} does not name",
        f"{SECOND!r} has tensor 'norm', which {INDEX} puts in {FIRST!r}",
    )


def test_a_tensor_in_two_shards_is_a_problem(sharded):
    both = {name: ARRAYS[name] for name in ("layers.0.weight", "norm")}
    write_safetensors(sharded / FIRST, both)
    assert_problems(sharded, [], f"{FIRST!r} has tensor 'norm', which {INDEX} puts in {SECOND!r}")


def test_a_damaged_index_never_raises(sharded):
    whole = (sharded / INDEX).read_bytes()
    num_problems = 0
    for seed in range(200):
        (sharded / INDEX).write_bytes(damaged(whole, seed))
        tensors, problems = open_sharded(sharded)
        assert_honest(tensors)
        assert problems or len(tensors) == len(ARRAYS)
        num_problems += bool(problems)
    assert num_problems > 100
