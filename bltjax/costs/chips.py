"""Published peaks of accelerators, for estimates of what a program can reach on them.

Everything is per device as JAX counts devices: a TPU7x chip is two, any other chip one. Link
bandwidth is one way over all links of a device, the rate at which a collective can receive; vendors
publish both ways together. A group along one side of a torus uses some links only, and networks
between slices or GPU hosts are slower: times that are derived from it are lower bounds.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """Peak rates and memory of one device."""

    kinds: tuple[str, ...]  # JAX's device_kind, or how it begins, with " " for "-"
    flops: float  # dense bfloat16 matrix products, FLOP/s
    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s one way: ICI or NVLink
    clock: float | None = None  # of a TPU's matrix units, Hz: its peak over their multipliers


CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * GIB, 1228e9, 300e9, 1.05e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 200e9, 1.5e9),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 600e9, 1.75e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1640e9, 400e9, 1.75e9),
    "tpu7x": Chip(("TPU7x",), 1153e12, 96 * GIB, 3690e9, 300e9, 2.2e9),
    "a100": Chip(("NVIDIA A100",), 312e12, 80 * GIB, 2039e9, 300e9),
    "h100": Chip(("NVIDIA H100",), 989e12, 80 * GIB, 3350e9, 450e9),
    "h100-pcie": Chip(("NVIDIA H100 PCIe",), 756e12, 80 * GIB, 2000e9, 300e9),
    "h100-nvl": Chip(("NVIDIA H100 NVL",), 835e12, 94 * GIB, 3938e9, 300e9),
    "gh200": Chip(("NVIDIA GH200",), 989e12, 96 * GIB, 4000e9, 450e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 141 * GIB, 4800e9, 450e9),
    "b200": Chip(("NVIDIA B200",), 2250e12, 180 * GIB, 8000e9, 900e9),
}

PEAKS = {kind: chip.flops for chip in CHIPS.values() for kind in chip.kinds}
