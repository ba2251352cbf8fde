"""Reads lazy arrays into the devices of a mesh."""

import math

import jax
import numpy as np

from bltjax.checkpoints import lazy_arrays
from bltjax.sharding import concrete


def put_lazy(tree: dict, abstract: dict) -> dict:
    """Reads a nested dict of lazy arrays onto the mesh that is set, sharded as `abstract` says.

    abstract: ShapeDtypeStructs, as from `functional.abstract_params`; arrays become of its dtypes.
    Each process reads what its devices hold, once, a device at a time. Raises ValueError that names
    what is missing, not expected, or of another shape.
    """
    expected = {".".join(path): tuple(x.shape) for path, x in lazy_arrays.tree_leaves(abstract)}
    given = {".".join(path): tuple(x.shape) for path, x in lazy_arrays.tree_leaves(tree)}
    found = [
        f"{name} is {given.get(name, 'missing')} instead of {expected.get(name, 'absent')}"
        for name in expected | given
        if given.get(name) != expected.get(name)
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"the weights are of another model: {'; '.join(found[:3])}{more}; "
            "give the configuration that they were trained with"
        )
    return jax.tree.map(_put_leaf, tree, concrete(abstract))


def _put_leaf(array: lazy_arrays.LazyArray, target: jax.ShapeDtypeStruct) -> jax.Array:
    devices_of = {}  # by piece; several may hold the same
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, target.shape, strict=True))
        devices_of.setdefault(spans, []).append(device)
    placed = []
    for spans, devices in devices_of.items():
        piece = _read_piece(array, spans, target.dtype)
        # Waits, so that the host holds no other piece while this one is on its way.
        placed += jax.block_until_ready([jax.device_put(piece, device) for device in devices])
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, placed)


def _read_piece(array: lazy_arrays.LazyArray, spans, dtype) -> np.ndarray:
    """Reads array[start:stop for each of spans] into another dtype, without a second copy."""
    piece = _aligned_empty([stop - start for start, stop in spans], dtype)
    for block in lazy_arrays.blocks(piece):
        piece[block] = array[
            tuple(slice(b.start + s[0], b.stop + s[0]) for b, s in zip(block, spans, strict=True))
        ]
    return piece


def _aligned_empty(shape, dtype) -> np.ndarray:
    """Returns an empty array aligned as XLA wants it: a CPU device uses it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
