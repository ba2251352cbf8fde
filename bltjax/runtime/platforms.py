"""Keeps JAX from starting libtpu where it is installed for `aot` and there is no TPU."""

import importlib.util
import sys
from collections.abc import MutableMapping
from importlib.metadata import entry_points
from pathlib import Path

# Any of these says more than what is seen here.
CHOICES = (
    "JAX_PLATFORMS",
    "JAX_PLATFORM_NAME",
    "JAX_FORCE_TPU_INIT",
    "PJRT_NAMES_AND_LIBRARY_PATHS",
    "MEGASCALE_NUM_SLICES",
)
ROOT = Path("/")
GOOGLE = "0x1ae0"  # vendor of PCI devices
NO_TPUS = ("0x001f", "0x0042")  # its disks and network cards
CUDA = ("xla_cuda12", "xla_cuda13")  # names of JAX's own plugins


def skip_absent_tpu(environ: MutableMapping[str, str]):
    """Sets JAX_PLATFORMS to the platforms but TPU, where libtpu is installed and no TPU is there.

    JAX would start libtpu, which prints that it finds none. Changes nothing where a variable or a
    device hints at a TPU, or a plugin is installed that JAX does not bring itself. To be called
    before JAX looks for devices.
    """
    if any(environ.get(name) for name in CHOICES) or any(n.startswith("TPU_") for n in environ):
        return
    if importlib.util.find_spec("libtpu") is None or has_tpu():
        return
    plugins = _plugins()
    if plugins <= set(CUDA):
        environ["JAX_PLATFORMS"] = "cuda,cpu" if plugins else "cpu"
        if "jax" in sys.modules:  # it has read the variable
            sys.modules["jax"].config.update("jax_platforms", environ["JAX_PLATFORMS"])


def has_tpu() -> bool:
    """Returns whether this machine has a device that may be a TPU."""
    if any(ROOT.glob("dev/accel*")) or any(ROOT.glob("dev/vfio/[0-9]*")):
        return True
    return any(
        _text(vendor) == GOOGLE and _text(vendor.with_name("device")) not in NO_TPUS
        for vendor in ROOT.glob("sys/bus/pci/devices/*/vendor")
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _plugins() -> set[str]:
    """Returns the names of JAX's installed plugins."""
    spec = importlib.util.find_spec("jax_plugins")
    found = {
        path.name
        for directory in (spec and spec.submodule_search_locations) or ()
        for path in Path(directory).glob("[!_.]*")
    }
    return found | {point.value.split(".")[-1] for point in entry_points(group="jax_plugins")}
