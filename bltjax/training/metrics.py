"""Metrics of a run: a progress line, JSON lines, TensorBoard."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from bltjax.checkpoints.run_directory import METRICS
from bltjax.runtime.files import replacing
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

    Opened at step s it drops the lines of s and later that an interrupted run wrote, so that a
    resumed run leaves the same lines as one that never stopped. Only the first process writes; all
    keep time. flops_per_byte and peak_flops (FLOP/s of all devices) give the utilisation, which
    needs both.
    """

    def __init__(
        self, directory: Path, stage, first_step, num_steps, flops_per_byte=None, peak_flops=None
    ):
        self.stage, self.num_steps = stage, num_steps
        self.path = directory / METRICS
        self._flops = flops_per_byte and peak_flops and flops_per_byte / peak_flops
        self._tensorboard = None
        if jax.process_index() == 0:
            # Here, since it loads PyTorch where there is one.
            from tensorboardX import SummaryWriter

            kept = [line for line in _lines(self.path) if line["step"] < first_step]
            with replacing(self.path) as file:  # atomic: a killed run loses no line
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
            self._tensorboard = SummaryWriter(f"{directory}/tensorboard", purge_step=first_step)
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
        if self._tensorboard is None:
            return
        stored = {key: value if math.isfinite(value) else None for key, value in line.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(stored) + "\n")
        for key, value in stored.items():
            if key != "step" and value is not None:
                self._tensorboard.add_scalar(f"{self.stage}/{key}", value, step)
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

    def close(self):
        if self._tensorboard is not None:
            self._tensorboard.close()


def format_seconds(seconds: float) -> str:
    """Formats a duration: 45s, 3m07s, 2h05m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _lines(path: Path) -> list[dict]:
    """Returns the lines of a JSON-lines file, without a last one that a crash cut short."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
