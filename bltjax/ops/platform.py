"""The kind of device that a program is traced for, where formulations differ by it."""

import jax


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu", of the mesh that is set; "cpu" for a mesh of shapes alone."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "cpu" if device is None else device.platform
