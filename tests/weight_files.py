"""Arrays for weight files, and damage as files suffer it."""

import math
import random

import numpy as np
from hypothesis import strategies as st

from bltjax.checkpoints import lazy_arrays
from bltjax.checkpoints.pytorch.safetensors_files import DTYPES

KINDS = sorted(DTYPES)
LIBRARY_KINDS = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "BOOL"]


def random_array(shape, kind="F32", seed=0):
    """Any bits: NaNs of all kinds, infinities, subnormal numbers."""
    dtype = DTYPES[kind]
    rng = np.random.default_rng(seed)
    if kind == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def named_arrays(draw, kinds=KINDS):
    names = draw(st.lists(st.text(max_size=5), unique=True, max_size=5))
    return {
        name: random_array(draw(shapes), draw(st.sampled_from(kinds)), i)
        for i, name in enumerate(names)
    }


def assert_same(array, expected):
    """Equal in shape, dtype and bits."""
    assert tuple(array.shape) == expected.shape
    assert array.dtype == expected.dtype
    assert np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(expected).tobytes()


def assert_all_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert_same(lazy_arrays.read_all(tensors[name]), array)


ARRAYS = {
    "layers.0.weight": random_array((3, 4)),
    "layers.1.weight": random_array((4, 3), "BF16", 1),
    "norm": random_array((6,), "BF16", 2),
    "step": random_array((), "I64", 3),
}


def assert_honest(tensors):
    """A damaged name is another name; what has its own name still is the same tensor."""
    for name in tensors.keys() & ARRAYS.keys():
        assert_same(lazy_arrays.read_all(tensors[name]), ARRAYS[name])
    assert len(tensors) <= len(ARRAYS)


def damaged(data: bytes, seed: int, regions=None) -> bytes:
    """`data` with one damage, other than `data`; at positions in `regions`, ranges, if given."""
    rng = random.Random(seed)
    region = rng.choice(regions) if regions else range(len(data))
    at = rng.choice(region)
    count = rng.choice([1, 1, 2, 7, 64])
    kind = rng.choice(["flip", "flip", "flip", "byte", "cut", "delete", "double"])
    if kind == "flip":
        result = bytearray(data)
        for i in range(at, min(at + rng.choice([1, 1, 1, 3]), region.stop)):
            result[i] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        result = bytearray(data)
        result[at] = (data[at] + rng.randrange(1, 256)) % 256
    elif kind == "cut":
        result = data[:at]
    elif kind == "delete":
        result = data[:at] + data[at + count :]
    else:
        result = data[: at + count] + data[at:]
    return bytes(result)
