"""Tells how much memory is left, so that what cannot fit is refused before it is allocated."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_LIMITS = (  # of the control group: what a container may use, of version 2 and 1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def free_bytes(device) -> int | None:
    """Returns about how many bytes a device of JAX has left; None where the system does not tell.

    CPU devices share the memory of the machine, or what a container may use of it.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    limits = (int(text) for text in map(_text, _LIMITS) if text.isdigit())
    return min([*_available(), *limits], default=None)


def _available() -> list[int]:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:  # not Linux
        return []
    return [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
