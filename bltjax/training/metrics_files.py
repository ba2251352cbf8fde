"""Files of metrics: JSON lines, and events for TensorBoard."""

import json
import os
import socket
import struct
import sys
import time
from pathlib import Path

from bltjax.checkpoints.run_directory import METRICS
from bltjax.runtime.files import replacing
from bltjax.runtime.plain_files import check_regular
from bltjax.runtime.system_errors import UnwritableError, writing


class MetricsFiles:
    """Appends steps to `metrics.jsonl` and to TensorBoard's events in a directory.

    Opened at step s it drops the lines of s and later that an interrupted run wrote, and lines that
    are no metrics. No file stays open and nothing waits in a thread, so that a full disk is an
    error of the step that it comes with: UnwritableError.
    """

    def __init__(self, directory: Path, stage: str, first_step: int):
        # Here, since it loads PyTorch where there is one.
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._protos, self._checksum = (event_pb2, summary_pb2), masked_crc32c
        self.stage, self.path = stage, directory / METRICS
        with writing(self.path):
            kept = [line for line in _lines(self.path) if line["step"] < first_step]
            with replacing(self.path) as file:  # atomic: a killed run loses no line
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.events = directory / "tensorboard" / name
        with writing(self.events):
            self.events.parent.mkdir(exist_ok=True)
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add_event(file_version="brain.Event:2")
        self._add_event(
            step=first_step, session_log=started
        )  # purges what was logged of later ones

    def write(self, step: int, values: dict[str, float | None]):
        """Appends the values of a step, None for what is not finite."""
        _append(self.path, (json.dumps(dict(step=step) | values) + "\n").encode())
        finite = [(f"{self.stage}/{key}", v) for key, v in values.items() if v is not None]
        of_value = self._protos[1].Summary.Value
        told = [of_value(tag=tag, simple_value=value) for tag, value in finite]
        self._add_event(step=step, summary=self._protos[1].Summary(value=told))

    def _add_event(self, **fields):
        """Appends a record of TensorBoard: its length and itself, each with a checksum."""
        data = self._protos[0].Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
        _append(self.events, length + sums[0] + data + sums[1])


def _append(path: Path, data: bytes):
    with writing(path), path.open("ab", buffering=0) as file:
        while data:
            data = data[file.write(data) :]


def _lines(path: Path) -> list[dict]:
    """Returns the metrics in a file of JSON lines, and tells of lines that are none."""
    try:
        check_regular(path)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UnwritableError(
            f"cannot write {path} ({error}): move what is in the way and run it again"
        ) from error
    found, bad = [], 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # what a crash cut short, or what is not even text
            values = None
        if isinstance(values, dict) and type(values.get("step")) is int:
            found.append(values)
        else:
            bad += 1
    if bad:
        print(f"WARNING: {path} had lines that are no metrics, left out: {bad}", file=sys.stderr)
    return found
