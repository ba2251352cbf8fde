"""Metrics of a run: a progress line, JSON lines, TensorBoard."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from bltjax.training.metrics_files import MetricsFiles
from bltjax.training.profiling import num_chips


class SourceMeter:
    """Bits per byte of each source since the last log line, and its bytes since the start.

    A resumed run goes on from `state`, and so logs what a run that never stopped would log.
    """

    def __init__(self, names: Sequence[str], state: dict | None = None):
        self.names = names
        self.state = state or {k: dict.fromkeys(names, 0.0) for k in ("seen", "nats", "bytes")}

    def count(self, nats, num_bytes):
        for name, n, b in zip(self.names, np.float64(nats), np.float64(num_bytes), strict=True):
            self.state["seen"][name] += b
            self.state["nats"][name] += n
            self.state["bytes"][name] += b

    def values(self) -> dict[str, float]:
        """Returns the next line's values; a source without bytes since the last has no bits."""
        found = {f"bytes_seen/{name}": seen for name, seen in self.state["seen"].items()}
        for name, num_bytes in self.state["bytes"].items():
            if num_bytes:
                found[f"bits_per_byte/{name}"] = self.state["nats"][name] / num_bytes / math.log(2)
            self.state["nats"][name] = self.state["bytes"][name] = 0.0
        return found


class MetricsLog:
    """Writes each logged step to `metrics.jsonl`, TensorBoard and the console.

    Opened at step s it drops what an interrupted run wrote of s and later, so that a resumed run
    leaves the same lines as one that never stopped. Only the first process writes; all keep time. flops_per_byte and peak_flops (FLOP/s of all devices) give the utilisation, which
    needs both.
    """

    def __init__(
        self, directory: Path, stage, first_step, num_steps, flops_per_byte=None, peak_flops=None
    ):
        self.stage, self.num_steps = stage, num_steps
        self._flops = flops_per_byte and peak_flops and flops_per_byte / peak_flops
        first = jax.process_index() == 0
        self._files = MetricsFiles(directory, stage, first_step) if first else None
        self._chips = num_chips()
        self.restart(first_step)

    def count(self, num_bytes: float):
        """Adds the real bytes of a step to the bytes per second of the next line."""
        self._bytes += float(num_bytes)

    def restart(self, step: int):
        """Starts the clock again, so that the next line leaves out the time to compile."""
        self._last_step, self._last_time, self._bytes = step, time.perf_counter(), 0.0
        self._waited, self._all_waited, self._started = 0.0, 0.0, self._last_time

    def waited(self, seconds: float):
        """Adds time in which the host had no batch for the devices."""
        self._waited += seconds
        self._all_waited += seconds

    @property
    def data_wait_fraction(self) -> float:
        """Share of the time since the log was opened, or restarted, that waited for data."""
        return self._all_waited / (time.perf_counter() - self._started)

    def write(self, step: int, values: dict):
        """Logs the metrics of `step`, counted from 0."""
        now = time.perf_counter()
        seconds = now - self._last_time
        speed = self._bytes / seconds
        line = dict(
            step=step,
            **{k: float(v) for k, v in values.items()},
            bytes_per_second=speed,
            bytes_per_second_per_chip=speed / self._chips,
            seconds_per_step=seconds / (step + 1 - self._last_step),
            data_wait_fraction=self._waited / seconds,
        )
        if self._flops:
            line["flops_utilisation"] = self._flops * speed
        self._last_step, self._last_time, self._bytes, self._waited = step + 1, now, 0.0, 0.0
        if self._files is None:
            return
        values = {key: value for key, value in line.items() if key != "step"}
        self._files.write(step, {k: v if math.isfinite(v) else None for k, v in values.items()})
        eta = (self.num_steps - step - 1) * line["seconds_per_step"]
        utilisation = f" mfu {line['flops_utilisation']:.0%}" if self._flops else ""
        print(
            f"{self.stage} step {step + 1}/{self.num_steps} ({(step + 1) / self.num_steps:.0%}) "
            f"loss {line['loss']:.3f} bits/byte {line['bits_per_byte']:.3f} "
            f"lr {line['learning_rate']:.1e} grad {line['grad_norm']:.2f} | "
            f"{speed / 1e3:.1f} KB/s {line['seconds_per_step']:.2f} s/step"
            f"{utilisation} | eta {format_seconds(eta)}",
            flush=True,
        )


def format_seconds(seconds: float) -> str:
    """Formats a duration: 45s, 3m07s, 2h05m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
