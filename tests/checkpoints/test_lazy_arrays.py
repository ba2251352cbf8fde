"""Lazy arrays equal NumPy's, whatever they are made of and however they are cut."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bltjax.checkpoints import lazy_arrays

DTYPES = [np.float32, np.float64, ml_dtypes.bfloat16, np.int8, np.bool_]


class Strict:
    """A lazy array that takes no index but those of the protocol, and counts what is read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.num_read = 0

    def __getitem__(self, index):
        assert isinstance(index, tuple) and len(index) == len(self.shape)
        for piece, n in zip(index, self.shape, strict=True):
            assert piece.step in (None, 1)
            assert 0 <= piece.start <= piece.stop <= n
        result = self.array[index].copy()
        self.num_read += result.size
        return result


def arange(shape, dtype=np.float32):
    return (np.arange(math.prod(shape)) % 251).reshape(shape).astype(dtype)


def shapes(min_dims=0, max_dims=4):
    return st.lists(st.integers(1, 5), min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def pieces(draw, shape):
    """An index with no empty slice."""
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    return tuple(slice(a, draw(st.integers(a + 1, n))) for a, n in zip(starts, shape, strict=True))


def assert_is(array, expected, data):
    """A lazy array has the shape, the dtype and, in pieces, the entries of `expected`."""
    assert tuple(array.shape) == expected.shape
    assert array.dtype == expected.dtype
    index = data.draw(pieces(expected.shape))
    piece = array[index]
    assert piece.dtype == expected.dtype
    np.testing.assert_array_equal(piece, expected[index])
    np.testing.assert_array_equal(lazy_arrays.read_all(array), expected)


@given(st.integers(1, 4), st.integers(1, 4), shapes(max_dims=2), st.data())
def test_rows_in_halves_as_pairs(num_heads, half, features, data):
    array = arange((num_heads * 2 * half, *features))
    heads = array.reshape(num_heads, 2, half, *features)
    expected = np.swapaxes(heads, 1, 2).reshape(array.shape)  # row i beside row i + D / 2
    assert_is(lazy_arrays.HalvesAsPairs(Strict(array), 2 * half), expected, data)


@given(shapes(), st.integers(1, 4), st.sampled_from(DTYPES), st.data())
def test_stacked(shape, num, dtype, data):
    parts = [arange(shape, dtype) + np.array(i).astype(dtype) for i in range(num)]
    assert_is(lazy_arrays.Stacked([Strict(part) for part in parts]), np.stack(parts), data)


@given(shapes(min_dims=1), st.data())
def test_member(shape, data):
    whole = arange(shape)
    i = data.draw(st.integers(0, shape[0] - 1))
    assert_is(lazy_arrays.Member(Strict(whole), i), whole[i], data)


@given(shapes(max_dims=3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_split(rest, num, rows, data):
    whole = arange((num * rows, *rest))
    assert_is(lazy_arrays.Split(Strict(whole), num), whole.reshape(num, rows, *rest), data)


@given(shapes(min_dims=2), st.data())
def test_joined(shape, data):
    whole = arange(shape)
    expected = whole.reshape(shape[0] * shape[1], *shape[2:])
    assert_is(lazy_arrays.Joined(Strict(whole)), expected, data)


@given(shapes(), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.data())
def test_cast(shape, dtype, new, data):
    whole = arange(shape, dtype)
    assert_is(lazy_arrays.Cast(Strict(whole), new), whole.astype(new), data)


def test_cast_rounds_to_nearest_and_ties_to_even():
    step = 2.0**-7  # of bfloat16 above 1
    given_ = np.array(
        [1 + 0.49 * step, 1 + 0.51 * step, 1 + 0.5 * step, 1 + 1.5 * step], np.float32
    )
    expected = np.array([1, 1 + step, 1, 1 + 2 * step])
    rounded = lazy_arrays.read_all(lazy_arrays.Cast(given_, ml_dtypes.bfloat16))
    np.testing.assert_array_equal(rounded.astype(np.float64), expected)


@given(st.data())
def test_classes_nest(data):
    """Layers stacked, joined and split again, as conversions do."""
    parts = [arange((4, 3)) + i for i in range(6)]
    stacked = lazy_arrays.Stacked([Strict(part) for part in parts])
    assert_is(lazy_arrays.Split(stacked, 3), np.stack(parts).reshape(3, 2, 4, 3), data)
    assert_is(lazy_arrays.Joined(stacked), np.concatenate(parts), data)
    assert_is(
        lazy_arrays.Split(lazy_arrays.Joined(stacked), 2), np.stack(parts).reshape(2, 12, 3), data
    )
    assert_is(lazy_arrays.Member(lazy_arrays.Split(stacked, 3), 1), np.stack(parts[2:4]), data)


def test_members_read_their_own_part_only():
    parts = [Strict(arange((4, 3))) for _ in range(3)]
    lazy_arrays.read_all(lazy_arrays.Member(lazy_arrays.Stacked(parts), 1))
    assert [part.num_read for part in parts] == [0, 12, 0]


def test_joined_reads_the_rows_asked_for_only():
    whole = Strict(arange((3, 4, 5)))
    lazy_arrays.Joined(whole)[slice(3, 5), slice(0, 2)]
    assert whole.num_read == 2 * 2


@given(shapes(), st.integers(1, 200), st.sampled_from(DTYPES))
def test_blocks_cover_once_in_c_order_within_the_limit(shape, max_bytes, dtype):
    array = np.arange(math.prod(shape)).reshape(shape)  # values of 8 bytes tell entries apart
    itemsize = np.dtype(dtype).itemsize
    assume(max_bytes >= itemsize)
    limited = np.empty(shape, dtype)
    read = []
    for index in lazy_arrays.blocks(limited, max_bytes):
        for piece, n in zip(index, shape, strict=True):
            assert piece.step in (None, 1) and 0 <= piece.start < piece.stop <= n
        assert 0 < limited[index].nbytes <= max_bytes
        read.append(array[index].reshape(-1))
    np.testing.assert_array_equal(np.concatenate(read), np.arange(array.size))


@pytest.mark.parametrize(
    "shape, max_bytes, num",
    [((8, 4), 16, 8), ((8, 4), 32, 4), ((8, 4), 127, 8 // 7 + 1), ((8, 4), 10**6, 1), ((), 4, 1)],
)
def test_blocks_are_as_large_as_the_limit_allows(shape, max_bytes, num):
    assert len(list(lazy_arrays.blocks(np.empty(shape, np.float32), max_bytes))) == num


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_entries_larger_than_the_limit_go_one_by_one(shape):
    indices = list(lazy_arrays.blocks(np.empty(shape, np.float64), 3))
    assert len(indices) == math.prod(shape)
    assert all(np.empty(shape)[index].size == 1 for index in indices)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_empty_arrays_have_no_blocks(shape):
    assert list(lazy_arrays.blocks(np.empty(shape))) == []
    assert lazy_arrays.num_bytes(np.empty(shape)) == 0


def test_num_bytes_counts_the_dtype():
    assert lazy_arrays.num_bytes(np.empty((2, 3), ml_dtypes.bfloat16)) == 12
    assert lazy_arrays.num_bytes(lazy_arrays.Cast(np.empty((2, 3)), np.float32)) == 24


@given(shapes(min_dims=2), st.integers(1, 8), st.sampled_from(DTYPES), st.data())
def test_with_rows(shape, rows, dtype, data):
    array = arange(shape, dtype)
    expected = np.zeros((shape[0], rows, *shape[2:]), dtype)
    kept = min(rows, shape[1])
    expected[:, :kept] = array[:, :kept]
    assert_is(lazy_arrays.WithRows(Strict(array), rows), expected, data)


def test_tree_leaves_go_in_order():
    tree = {"b": {"x": 1, "a": 2}, "a": 3, "none": {}}
    assert list(lazy_arrays.tree_leaves(tree)) == [(("b", "x"), 1), (("b", "a"), 2), (("a",), 3)]
