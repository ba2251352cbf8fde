"""Reads lazy arrays into the devices of a mesh."""

import math

import jax
import numpy as np

from bltjax.checkpoints import lazy_arrays
from bltjax.checkpoints.weights import flat, shapes
from bltjax.model import functional
from bltjax.sharding import concrete


def put_lazy(tree: dict, abstract: dict) -> dict:
    """Puts a nested dict of lazy arrays on the devices of the mesh that is set.

    abstract: its shapes, dtypes and shardings, as from `functional.abstract_params`.
    Each process reads what its devices hold, once, a device at a time. Raises ValueError that names
    what is missing, not expected, or of another shape.
    """
    if found := differing(shapes(flat(tree)), shapes(flat(abstract))):
        raise ValueError(
            f"the weights are of another model: {found}; give the configuration that they were "
            "trained with"
        )
    return jax.tree.map(_put_leaf, tree, concrete(abstract))


def differing(given: dict, expected: dict) -> str:
    """Names entries of two dicts that differ, the first three of them; "" where none does."""
    found = [
        f"{name} is {given.get(name, 'missing')} instead of {expected.get(name, 'absent')}"
        for name in expected | given
        if given.get(name) != expected.get(name)
    ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def put_model(config, tree: dict) -> dict:
    """Returns a model's parameters as `put_lazy` does, in the dtypes that they have."""
    abstract = jax.tree.map(
        lambda known, leaf: jax.ShapeDtypeStruct(known.shape, leaf.dtype, sharding=known.sharding),
        functional.abstract_params(config),
        tree,
    )
    return put_lazy(tree, abstract)


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
    """Reads array[start:stop for each of spans] in another dtype, without a second copy of it."""
    piece = _aligned_empty([stop - start for start, stop in spans], dtype)
    for block in lazy_arrays.blocks(piece):
        piece[block] = array[
            tuple(slice(b.start + s[0], b.stop + s[0]) for b, s in zip(block, spans, strict=True))
        ]
    return piece


def _aligned_empty(shape, dtype) -> np.ndarray:
    """Returns an empty array at an address from which CPU devices take it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
