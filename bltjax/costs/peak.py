"""Looks up the peak FLOP/s of the devices in data sheets, or measures it on CPUs."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from bltjax import sharding
from bltjax.costs.chips import find_chip

MATRIX = 512  # rows and columns of the matrices whose product is timed


def peak_flops(compute_dtype: str) -> float | None:
    """Returns the peak FLOP/s of the whole mesh in matrix products; None for unknown accelerators.

    Data sheets count bfloat16, whatever `compute_dtype`, since accelerators multiply float32 in
    bfloat16 too unless told otherwise. CPUs are timed, all devices at once, since simulated devices
    share the cores.
    """
    chip = find_chip(jax.devices()[0].device_kind)
    if chip is not None:
        return chip.flops * jax.device_count()
    if jax.devices()[0].platform != "cpu":
        return None
    return _measured_peak(compute_dtype, jax.sharding.get_mesh())


@functools.cache
def _measured_peak(compute_dtype: str, mesh) -> float:
    rows = sharding.num_row_shards(mesh)
    with jax.set_mesh(mesh):
        own = np.zeros((len(sharding.rows_of_process(rows)), MATRIX, MATRIX), np.float32)
        x = sharding.put_batch(own).astype(compute_dtype)
        product = jax.jit(lambda x: jnp.einsum("bij,bjk->bik", x, x))
        product(x).block_until_ready()
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            product(x).block_until_ready()
            seconds.append(time.perf_counter() - started)
    return 2 * mesh.size * MATRIX**3 / min(seconds)  # those of a tensor group all compute its row
