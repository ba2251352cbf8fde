"""What the device can do at most: products, memory, loops, rows of tables; random data.

Constant data is faster on some GPUs, whose clocks follow the power that they draw.
"""

import functools
import os
import platform
import sys
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from accelerator.notes import Notes
from accelerator.timing import device_bytes, seconds_of

from bltjax.costs.chips import find_chip

PACKAGES = "jax jaxlib flax optax grain orbax-checkpoint numpy torch transformers tokamax"
VARIABLES = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_FLAGS", "LIBTPU_INIT_ARGS"
ROUNDS = 1000  # of loops that do next to nothing


def about(notes: Notes):
    """Notes what figures depend on."""
    device, versions = jax.devices()[0], {}
    for name in (*PACKAGES.split(), "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    chip = find_chip(device.device_kind)
    notes.write(
        "about",
        device=device.device_kind,
        platform=device.platform,
        platform_version=device.client.platform_version,
        capability=getattr(device, "compute_capability", None),
        python=sys.version.split()[0],
        system=platform.platform(),
        versions=versions,
        environment={name: os.environ.get(name) for name in VARIABLES},
        memory_bytes=device_bytes("bytes_limit"),
        data_sheet=chip and dict(tflops=chip.flops / 1e12, gbs=chip.hbm_bandwidth / 1e9),
    )


def measure(notes: Notes):
    """Notes all ceilings, each a finding."""
    for ceiling in (_products, _memory, _loops, _rows, _sums):
        try:
            ceiling(notes)
        except Exception as error:
            notes.failed(error, of=ceiling.__name__.strip("_"))


def _normal(seed: int, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _note_rate(notes, what: str, seconds: float, flops=None, num_bytes=None, **more):
    """Notes a time, and the rates that follow from it with their share of the data sheet."""
    chip, found = find_chip(jax.devices()[0].device_kind), dict(ms=1e3 * seconds)
    if flops:
        found["tflops"] = flops / seconds / 1e12
    if num_bytes:
        found["gbs"] = num_bytes / seconds / 1e9
    if chip:
        peak = flops / chip.flops if flops else num_bytes / chip.hbm_bandwidth
        found["of_data_sheet"] = peak / seconds
    notes.write("ceiling", what=what, **found, **more)


def _products(notes: Notes):
    """Square ones, and those of the feed-forward layers of blt_1b at 8 rows of 8192 bytes."""
    sizes = dict(square=(8192, 8192, 8192), local=(65_536, 1024, 2816), trunk=(14_336, 2048, 5632))
    for name, (rows, width, columns) in sizes.items():
        if notes.tiny:
            rows, width, columns = 256, 128, 256
        a, b = _normal(0, rows, width), _normal(1, width, columns)
        seconds = seconds_of(jax.jit(jnp.matmul), a, b)
        shape = f"{rows}x{width}x{columns}"
        _note_rate(notes, f"product, {name}", seconds, flops=2 * rows * width * columns, of=shape)


def _memory(notes: Notes):
    x = _normal(0, 2**18 if notes.tiny else 2**30, dtype=jnp.float32)
    _note_rate(notes, "copy", seconds_of(jax.jit(lambda x: x + 1), x), num_bytes=2 * x.nbytes)
    size = (256, 128) if notes.tiny else (5632, 2048)  # w1 of blt_1b
    w, v = _normal(0, *size), _normal(1, 1, size[1])

    def chain(v):
        return jax.lax.fori_loop(0, 64, lambda _, v: jnp.tanh(v @ w.T)[:, : size[1]], v)

    seconds = seconds_of(jax.jit(chain), v) / 64
    _note_rate(notes, "matrix times vector, in a loop", seconds, num_bytes=w.nbytes)


def _loops(notes: Notes):
    """Rounds of a loop whose length is not known, and choices: on GPUs the host takes part."""

    def count(v, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] + 1), (0, v))[1]

    def choose(v, n):
        def body(_, v):
            return jax.lax.cond(v[0] < n, lambda v: v + 1, lambda v: v - 1, v)

        return jax.lax.fori_loop(0, ROUNDS, body, v)

    v = jnp.zeros(128)
    for what, loop, n in (("while", count, jnp.int32(ROUNDS)), ("cond", choose, jnp.float32(0))):
        us = 1e6 * seconds_of(jax.jit(loop), v, n, calls=1) / ROUNDS
        notes.write("ceiling", what=f"{what}, a round", ms=us / 1e3, us=us)


def _rows(notes: Notes):
    """Hash tables of blt_1b: six of its rows for each byte of a step."""
    table_rows, count, width = 3_010_560, 65_536, 1024
    if notes.tiny:
        table_rows, count, width = 60_000, 1024, 64
    elif memory := device_bytes("bytes_limit"):
        table_rows = min(table_rows, memory // 4 // (4 * width))
    table = _normal(0, table_rows, width, dtype=jnp.float32)
    ids = jax.random.randint(jax.random.key(1), (6, count), 0, table_rows)
    gradient = _normal(2, count, width, dtype=jnp.float32)
    num_bytes = 6 * gradient.nbytes

    def lookup(table, ids):
        return functools.reduce(jnp.add, (table[i] for i in ids))

    seconds = seconds_of(jax.jit(lookup), table, ids)
    _note_rate(notes, "rows read", seconds, num_bytes=num_bytes, rows=6 * count)

    @functools.partial(jax.jit, donate_argnums=0)
    def scatter(table, ids, gradient):
        return functools.reduce(lambda t, i: t.at[i].add(gradient), ids, table)

    def again(ids, gradient):
        nonlocal table
        table = scatter(table, ids, gradient)
        return table

    seconds = seconds_of(again, ids, gradient, calls=3)
    _note_rate(notes, "rows added to", seconds, num_bytes=2 * num_bytes, rows=6 * count)


def _sums(notes: Notes):
    """Sums of the bytes of each patch, the gradient of reading patches, in two precisions."""
    length, width, patches = (512, 64, 128) if notes.tiny else (65_536, 2048, 14_336)
    starts = np.sort(np.random.default_rng(0).choice(length, patches, replace=False))
    ids = np.searchsorted(starts, np.arange(length), side="right") - 1
    ids = jnp.asarray(np.maximum(ids, 0), jnp.int32)
    for dtype in (jnp.bfloat16, jnp.float32):
        x = _normal(0, length, width, dtype=dtype)

        def sums(x, ids, dtype=dtype):
            return jnp.zeros((patches, width), dtype).at[ids].add(x)

        what = f"sums of patches, {jnp.dtype(dtype).name}"
        _note_rate(notes, what, seconds_of(jax.jit(sums), x, ids), num_bytes=x.nbytes)
