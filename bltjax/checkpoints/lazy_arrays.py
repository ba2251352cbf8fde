"""Arrays that are read piece by piece, so that weights may be larger than memory.

A lazy array has `shape`, `dtype` and `array[index]`, which reads that piece alone and returns it
as a NumPy array. An index is a tuple of slices of step 1, one per axis, inside the shape. NumPy
arrays and memory maps are lazy arrays; the classes below make others out of them.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

BLOCK_BYTES = 64 * 2**20  # what is in memory of one array at a time

Index = tuple[slice, ...]


class LazyArray(Protocol):
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Index) -> np.ndarray: ...


class Stacked:
    """Arrays of one shape [...] and dtype as one array [len(parts), ...]."""

    def __init__(self, parts: Sequence[LazyArray]):
        self.parts, self.dtype = parts, parts[0].dtype
        self.shape = (len(parts), *parts[0].shape)

    def __getitem__(self, index: Index) -> np.ndarray:
        return np.stack([part[index[1:]] for part in self.parts[index[0]]])


class Member:
    """Entry `i` of an array [N, ...]: an array [...]."""

    def __init__(self, whole: LazyArray, i: int):
        self.whole, self.i = whole, i
        self.shape, self.dtype = tuple(whole.shape[1:]), whole.dtype

    def __getitem__(self, index: Index) -> np.ndarray:
        return self.whole[(slice(self.i, self.i + 1), *index)][0]


class Split:
    """An array [N * R, ...] as [N, R, ...], without copying anything."""

    def __init__(self, whole: LazyArray, num: int):
        self.whole, self.dtype = whole, whole.dtype
        self.rows = whole.shape[0] // num
        self.shape = (num, self.rows, *whole.shape[1:])

    def __getitem__(self, index: Index) -> np.ndarray:
        first, last, _ = index[1].indices(self.rows)
        return np.stack(
            [
                self.whole[(slice(i * self.rows + first, i * self.rows + last), *index[2:])]
                for i in range(*index[0].indices(self.shape[0]))
            ]
        )


class Joined:
    """An array [N, R, ...] as [N * R, ...]."""

    def __init__(self, whole: LazyArray):
        self.whole, self.dtype = whole, whole.dtype
        self.shape = (whole.shape[0] * whole.shape[1], *whole.shape[2:])

    def __getitem__(self, index: Index) -> np.ndarray:
        rows = self.whole.shape[1]
        first, last, _ = index[0].indices(self.shape[0])
        pieces = []
        while first < last:
            i, row = divmod(first, rows)
            stop = min(rows, row + last - first)
            pieces.append(self.whole[(slice(i, i + 1), slice(row, stop), *index[1:])][0])
            first += stop - row
        return np.concatenate(pieces)


class WithRows:
    """An array [N, R, ...] with another number of rows: the first ones, or zeros after the last."""

    def __init__(self, whole: LazyArray, rows: int):
        self.whole, self.dtype = whole, whole.dtype
        self.shape = (whole.shape[0], rows, *whole.shape[2:])

    def __getitem__(self, index: Index) -> np.ndarray:
        first, last, _ = index[1].indices(self.shape[1])
        held = self.whole.shape[1]
        if last <= held:
            return self.whole[index]
        spans = [i.indices(n)[:2] for i, n in zip(index, self.shape, strict=True)]
        piece = np.zeros([stop - start for start, stop in spans], self.dtype)
        if first < held:
            piece[:, : held - first] = self.whole[(index[0], slice(first, held), *index[2:])]
        return piece


class HalvesAsPairs:
    """An array [H * D, ...] with its rows in the order in which pairs of neighbours turn.

    The whole has, in each group of D rows, those that turn together D / 2 apart: its rows i and
    i + D / 2 become rows 2 i and 2 i + 1.
    """

    def __init__(self, whole: LazyArray, width: int):
        self.whole, self.width = whole, width
        self.shape, self.dtype = tuple(whole.shape), np.dtype(whole.dtype)

    def __getitem__(self, index: Index) -> np.ndarray:
        first, last, _ = index[0].indices(self.shape[0])
        begin, end = first // self.width, -(-last // self.width)  # groups that are read whole
        group, row = np.divmod(np.arange(first, last), self.width)
        there = (group - begin) * self.width + row // 2 + row % 2 * (self.width // 2)
        groups = slice(begin * self.width, end * self.width)
        return self.whole[(groups, *index[1:])][there]


class Cast:
    """An array in another dtype, rounded to nearest, piece by piece.

    Reading raises ValueError where the dtype cannot hold a value.
    """

    def __init__(self, whole: LazyArray, dtype):
        self.whole, self.shape, self.dtype = whole, tuple(whole.shape), np.dtype(dtype)

    def __getitem__(self, index: Index) -> np.ndarray:
        piece = self.whole[index]
        with np.errstate(over="ignore"):
            cast = piece.astype(self.dtype)
        if num_nonfinite(cast) > num_nonfinite(piece):
            raise ValueError(
                f"values up to {np.abs(piece).max()} are beyond {self.dtype.name}: keep the dtype, "
                "or choose float32"
            )
        return cast


class Adapted:
    """Matrices [..., out, in] with an adapter: whole + scale * up @ down, computed in float32.

    up: [..., out, rank]; down: [..., rank, in].
    """

    def __init__(self, whole: LazyArray, up: LazyArray, down: LazyArray, scale: float):
        self.whole, self.up, self.down, self.scale = whole, up, down, scale
        self.shape, self.dtype = tuple(whole.shape), np.dtype(whole.dtype)

    def __getitem__(self, index: Index) -> np.ndarray:
        *layers, rows, columns = index
        every = slice(0, self.down.shape[-2])
        up = np.asarray(self.up[(*layers, rows, every)], np.float32)
        down = np.asarray(self.down[(*layers, every, columns)], np.float32)
        whole = np.asarray(self.whole[index], np.float32)
        return (whole + np.float32(self.scale) * (up @ down)).astype(self.dtype)


def num_bytes(array: LazyArray) -> int:
    """Returns the size of a whole array."""
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def blocks(
    array: LazyArray, max_bytes: int = BLOCK_BYTES, chunk: Sequence[int] | None = None
) -> Iterator[Index]:
    """Yields indices that together cover the array once, each at most `max_bytes` large.

    chunk: a shape that is not cut, even if it is larger. Without it, the bytes of all pieces joined
    in order are the array's in C order.
    """
    shape, itemsize = array.shape, np.dtype(array.dtype).itemsize
    if 0 in shape:  # there is nothing to cover, be other axes ever so long
        return
    block = list(chunk or [1] * len(shape))
    # Inner axes first: an axis is cut only where all axes inside it are whole.
    for axis in reversed(range(len(shape))):
        times = max(1, max_bytes // (math.prod(block) * itemsize))
        block[axis] = max(1, min(shape[axis], block[axis] * times))
    spans = (
        [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for size, step in zip(shape, block, strict=True)
    )
    yield from itertools.product(*spans)


def num_nonfinite(values: np.ndarray) -> int:
    """Counts the values of a floating-point array that are NaN or infinite."""
    if values.dtype == ml_dtypes.bfloat16:  # isfinite of bfloat16 is slow: all exponent bits set
        return int(np.count_nonzero(values.view(np.uint16) & np.uint16(0x7F80) == 0x7F80))
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def read_all(array: LazyArray) -> np.ndarray:
    """Reads the whole array into memory."""
    return np.asarray(array[tuple(slice(0, n) for n in array.shape)])


def insert(tree: dict, path: Sequence[str], leaf):
    """Adds a leaf to a nested dict, in place."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def tree_leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields (path, leaf) of a nested dict, in order."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from tree_leaves(value, (*path, key))
    else:
        yield path, tree
