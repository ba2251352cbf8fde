"""Times of programs, and where the time of a step goes, on the first device."""

import collections
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import jax

TOP = 20  # operations that are told of


def seconds_of(call, *arguments, calls: int = 10, repeats: int = 3) -> float:
    """Returns the median seconds of a call, of `calls` that are handed over one after the other."""
    jax.block_until_ready(call(*arguments))  # compiles
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            result = call(*arguments)  # of the calls before, nothing is kept
        jax.block_until_ready(result)
        found.append((time.perf_counter() - started) / calls)
    return statistics.median(found)


def device_bytes(name: str = "peak_bytes_in_use") -> int | None:
    """Returns a number of the device's allocator; None where it tells none, as on CPUs."""
    return (jax.devices()[0].memory_stats() or {}).get(name)


@contextlib.contextmanager
def traced():
    """Profiles what is inside; the value is a list that holds `summary` of the trace afterwards."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            yield found
        (trace,) = Path(directory).glob("plugins/profile/*/*.xplane.pb")
        found.append(summary(device_events(trace)))


def device_events(trace: Path) -> list[tuple[str, float, float]]:
    """Returns (name, start, end), in seconds, of what the device executed.

    Of GPUs these are kernels and copies, by stream; of TPUs operations; of CPUs operations too,
    with those that they call.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
    lines = [line for plane in devices for line in plane.lines]
    streams = [line for line in lines if line.name.startswith("Stream")]
    lines = streams or [line for line in lines if line.name == "XLA Ops"]
    if not devices:
        lines = [x for plane in planes for x in plane.lines if x.name != "python"]
    return [
        (event.name, event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9)
        for line in lines
        for event in line.events
        if event.duration_ns and (devices or "hlo_op" in dict(event.stats))
    ]


def summary(events: list[tuple[str, float, float]]) -> dict:
    """Returns how many events there are, the share of time without any, and the longest by name.

    Events that overlap count once for the idle share, and each by its name.
    """
    total, calls = collections.Counter(), collections.Counter()
    busy, end = 0.0, float("-inf")
    for name, start, stop in sorted(events, key=lambda event: event[1]):
        total[name] += stop - start
        calls[name] += 1
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    wall = end - min(start for _, start, _ in events) if events else 0.0
    top = [
        dict(name=name[:80], ms=1e3 * seconds, calls=calls[name])
        for name, seconds in total.most_common(TOP)
    ]
    idle = 1 - busy / wall if wall else None
    return dict(launches=len(events), wall_ms=1e3 * wall, idle=idle, top=top)
