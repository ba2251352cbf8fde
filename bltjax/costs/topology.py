"""Makes devices to compile for, not to run on, from names such as v5e:16x16 or h100:1x2x8."""

import importlib.util
import math
import re

from bltjax.costs.chips import CHIPS, Chip

EXAMPLES = {
    "v4": "v4:4x4x4",
    "v5e": "v5e:16x16",
    "v5p": "v5p:4x4x8",
    "v6e": "v6e:16x16",
    "tpu7x": "tpu7x:4x4x4",
    "a100": "a100:1x2x8",
    "h100": "h100:1x2x8",
    "h200": "h200:1x2x8",
}
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_POD = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}  # chips, at most
_WRAPPED = ("v4", "v5p", "tpu7x")  # three-dimensional: cubes of 4 close to a torus
# What XLA must know of a GPU: (compute capability, SMs, shared memory of a block and of an SM, L2,
# GHz), as NVIDIA publishes them.
_GPUS = {
    "a100": ((8, 0), 108, 166_912, 167_936, 41_943_040, 1.41),
    "h100": ((9, 0), 132, 232_448, 233_472, 52_428_800, 1.98),
    "h200": ((9, 0), 132, 232_448, 233_472, 52_428_800, 1.98),
}


def chip_and_sizes(name: str) -> tuple[str, tuple[int, ...]]:
    """Splits "v5e:16x16" into ("v5e", (16, 16)). Raises ValueError that lists known chips."""
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in EXAMPLES:
        raise ValueError(
            f"--topology={name} is not known: give one of {', '.join(EXAMPLES.values())}, with "
            "other sizes as you like (a v5litepod-16 is v5e:4x4; GPUs are slices x hosts x GPUs)"
        )
    chip, sizes = found[1], tuple(map(int, found[2].split("x")))
    wanted = EXAMPLES[chip].count("x") - chip.count("x") + 1
    if len(sizes) != wanted or 0 in sizes:
        raise ValueError(
            f"--topology={name} has {len(sizes)} sizes, {chip} takes {wanted} from 1: for example "
            f"{EXAMPLES[chip]}"
        )
    if math.prod(sizes) > _POD.get(chip, math.inf):
        raise ValueError(
            f"--topology={name} has {math.prod(sizes)} chips, and a pod of {chip} at most "
            f"{_POD[chip]}: give a smaller one, and --slices"
        )
    return chip, sizes


def topology_devices(name: str, slices: int = 1) -> tuple[Chip, list]:
    """Returns the chip of a topology and its devices. Raises ValueError with the remedy."""
    chip, sizes = chip_and_sizes(name)
    is_gpu = chip in _GPUS
    compilers = CUDA_PLUGINS if is_gpu else ("libtpu",)
    if not any(map(importlib.util.find_spec, compilers)):
        raise ValueError(
            f"--topology={name} is compiled by {' or '.join(compilers)}, which is not installed: "
            "pip install -e '.[aot]'"
        )
    if is_gpu and slices > 1:
        raise ValueError(f"--slices={slices} is of TPUs: of GPUs, the first size of --topology is")
    options = _gpu_options(chip, sizes) if is_gpu else _tpu_options(chip, sizes, slices)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(**options)
    except Exception as error:  # of several types, by version
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--topology={name} cannot be made ({reason}): the first two sizes of TPUs are even, "
            "or all are 1"
        ) from error
    return CHIPS[chip], list(found.devices)


def _tpu_options(chip, sizes, slices) -> dict:
    name = f"{chip}:{'x'.join(map(str, sizes))}"
    options = dict(platform="tpu", topology_name=name, num_slices=slices)
    if all(size == 1 for size in sizes):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip in _WRAPPED and all(size % 4 == 0 for size in sizes):
        options["wrap"] = (True, True, True)  # else gathers become sums, and compile slowly
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on a TPU VM
    return options


def _gpu_options(chip, sizes) -> dict:
    (major, minor), cores, shared, shared_core, cache, clock = _GPUS[chip]
    config = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_core}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {64 if major == 8 else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(CHIPS[chip].hbm_bandwidth)}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {CHIPS[chip].hbm_bytes}
  shared_memory_per_block_optin: {shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 3 }}
device_description_str: "{chip.upper()}"
"""  # a GpuTargetConfigProto of XLA
    topology = "x".join(map(str, sizes))
    return dict(platform="cuda", topology_name=chip, topology=topology, target_config=config)
