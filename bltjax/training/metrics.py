"""Metrics of a run: a progress line, JSON lines, TensorBoard."""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from bltjax.checkpoints.run_directory import METRICS
from bltjax.runtime.files import replacing
from bltjax.runtime.progress import format_seconds
from bltjax.training.profiling import num_chips

HELD_OUT = "held_out_bits_per_byte"  # name in a line; with /NAME it is that of a source


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


class StepMeans:
    """Means of the metrics of the steps since the last log line.

    Bits per byte are those of all bytes of these steps, and the other values plain means. What only
    the newest step can tell is its own. Updates that were left out count in nothing else. A resumed
    run goes on from `state`.
    """

    NEWEST = ("learning_rate", "skipped", "skipped_in_a_row")

    def __init__(self, state: dict | None = None):
        self.state = state or dict(steps=0, sums={})
        self._newest = {}

    def count(self, metrics: dict):
        self._newest = {key: float(value) for key, value in metrics.items()}
        if metrics.get("skipped_in_a_row"):
            return
        self.state["steps"] += 1
        for key, value in self._newest.items():
            weight = self._newest["bytes"] if key == "bits_per_byte" else 1.0
            self.state["sums"][key] = self.state["sums"].get(key, 0.0) + weight * value

    def values(self) -> dict[str, float]:
        """Returns the next line's values; those of the newest step where all were left out."""
        sums, steps = self.state["sums"], self.state["steps"]
        means = {key: total / steps for key, total in sums.items()} if steps else {}
        if means.get("bytes"):
            means["bits_per_byte"] = sums["bits_per_byte"] / sums["bytes"]
        newest = {key: self._newest[key] for key in self.NEWEST if key in self._newest}
        self.state.update(steps=0, sums={})
        return self._newest | means | newest


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
        self._first_step = self._last_step = step
        self._last_time, self._bytes = time.perf_counter(), 0.0
        self._waited, self._all_waited, self._started = 0.0, 0.0, self._last_time

    def waited(self, seconds: float):
        """Adds time in which the host had no batch for the devices."""
        self._waited += seconds
        self._all_waited += seconds

    @property
    def data_wait_fraction(self) -> float:
        """Share of the time since the log was opened, or restarted, that waited for data."""
        return self._all_waited / (time.perf_counter() - self._started)

    @contextlib.contextmanager
    def paused(self):
        """Leaves the time of its body out of the speed of the next line."""
        began = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - began

    def write(self, step: int, values: dict):
        """Logs the metrics of the steps since the last line, up to `step`, counted from 0."""
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
        # Of all steps so far: those of one line, the first above all, may be unusual ones.
        mean_seconds = (now - self._started) / (step + 1 - self._first_step)
        eta = (self.num_steps - step - 1) * mean_seconds
        held_out = f" held out {line[HELD_OUT]:.3f}" if HELD_OUT in line else ""
        utilisation = f" mfu {line['flops_utilisation']:.0%}" if self._flops else ""
        print(
            f"{self.stage} step {step + 1}/{self.num_steps} ({(step + 1) / self.num_steps:.0%}) "
            f"loss {line['loss']:.3f} bits/byte {line['bits_per_byte']:.3f}{held_out} "
            f"lr {line['learning_rate']:.1e} grad {line['grad_norm']:.2f} | "
            f"{speed / 1e3:.1f} KB/s {line['seconds_per_step']:.2f} s/step"
            f"{utilisation} | eta {format_seconds(eta)}",
            flush=True,
        )

    def close(self):
        if self._tensorboard is not None:
            self._tensorboard.close()


def _lines(path: Path) -> list[dict]:
    """Returns the lines of a JSON-lines file, without a last one that a crash cut short."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
