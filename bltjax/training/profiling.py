"""Memory of the machine while it trains, and traces of training steps."""

import contextlib
import resource
import sys
from pathlib import Path

import jax

from bltjax.config import ProfileConfig


def num_chips() -> int:
    """Counts the chips of all processes; some TPUs have two devices on a chip."""
    devices = jax.devices()
    if devices[0].platform != "tpu":
        return len(devices)
    return len({(getattr(d, "slice_index", 0), *d.coords) for d in devices})


def memory() -> dict[str, float]:
    """Returns peak bytes of the fullest local device, where it reports them, and of the process."""
    found = {}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        found["device_memory_bytes"] = float(max(peaks))
    unit = 1 if sys.platform == "darwin" else 1024
    found["host_memory_bytes"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    return found


class Profiler:
    """Traces the steps that a ProfileConfig names, in process 0, for xprof and Perfetto.

    shown: where the files go from the directory, if they do.
    """

    def __init__(
        self, config: ProfileConfig | None, stage: str, directory: Path, shown: Path | None = None
    ):
        self._directory, self._shown, self._traced = directory, shown or directory, []
        wanted = config is not None and config.first_step is not None and config.stage == stage
        self._steps = range(0)
        if wanted and jax.process_index() == 0:
            self._steps = range(config.first_step, config.first_step + config.num_steps)

    def step(self, step: int, previous=None):
        """Returns the context to run a step in; a trace waits for `previous`, the step before."""
        if step not in self._steps:
            self.close(previous)
            return contextlib.nullcontext()
        if not self._traced:
            jax.block_until_ready(previous)
            jax.profiler.start_trace(str(self._directory))
        self._traced.append(step)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def close(self, previous=None):
        if self._traced:
            jax.block_until_ready(previous)
            jax.profiler.stop_trace()
            print(
                f"trace of steps {self._traced[0]} to {self._traced[-1]}: {self._shown}",
                flush=True,
            )
            self._traced = []
