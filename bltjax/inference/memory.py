"""Bytes that arrays would take on a device, beside those that it has free."""

import math

import jax

from bltjax import sharding
from bltjax.runtime.free_memory import free_bytes

GIB = 2**30


def needed_and_free(abstract) -> tuple[int, int | None]:
    """Returns bytes that a pytree of ShapeDtypeStructs takes on a device, and those free there.

    Of the devices of this process under the mesh that is set; those of CPUs share the memory of the
    machine and count together. Free: None where the system does not tell.
    """
    mesh = jax.sharding.get_mesh()
    here = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    needed = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(sharding.concrete(abstract))
    )
    if here[0].platform == "cpu":
        needed *= len(here)
    return needed, free_bytes(here[0])
