"""The files of metrics: what an earlier run left there, whatever it is, and what is added."""

import json
import os
import struct
from pathlib import Path

import pytest

from bltjax.runtime.system_errors import UnwritableError
from bltjax.training.metrics_files import MetricsFiles

GARBAGE = [
    b"\x00\xff\xfe\x80garbage",
    b'{"step": 1, "lo',
    b"[1, 2]",
    b"null",
    b'"step"',
    b"{}",
    b'{"step": "1"}',
    b'{"step": null}',
    b'{"step": true}',
    b'{"step": 1.5}',
    b"[" * 100_000,
]


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").open()]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("place", [0, 2, 4])
def test_garbage_costs_no_line_of_metrics(tmp_path, capsys, garbage, place):
    found = [json.dumps(dict(step=step, loss=float(step))).encode() for step in range(4)]
    found.insert(place, garbage)
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(found))
    MetricsFiles(tmp_path, "toy", 3).write(3, dict(loss=9.0))
    assert lines(tmp_path) == [dict(step=step, loss=float(step)) for step in range(3)] + [
        dict(step=3, loss=9.0)
    ]
    (told,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/metrics.jsonl" in told and told.endswith(" 1")


@pytest.mark.parametrize(
    "name, make",
    [("metrics.jsonl", Path.mkdir), ("metrics.jsonl", os.mkfifo), ("tensorboard", Path.touch)],
)
def test_what_is_in_the_way_is_named(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(UnwritableError, match=rf"{tmp_path}/{name}.*\): move .* in the way"):
        MetricsFiles(tmp_path, "toy", 0)


def test_a_directory_that_vanished_is_not_made_anew(tmp_path):
    directory = tmp_path / "stage"
    directory.mkdir()
    files = MetricsFiles(directory, "toy", 0)
    directory.rename(tmp_path / "elsewhere")
    with pytest.raises(UnwritableError, match="put the directory back and run it again"):
        files.write(0, dict(loss=1.0))
    assert not directory.exists()


def test_tensorboard_reads_the_events(tmp_path):
    """Records as TensorBoard frames them, with the protocol buffers of its package."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c

    files = MetricsFiles(tmp_path, "toy", 2)
    files.write(2, dict(loss=1.5, grad_norm=None))
    files.write(3, dict(loss=2.5))
    data, events = files.events.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        sums = struct.unpack("<I", data[8:12]) + struct.unpack(
            "<I", data[12 + length : 16 + length]
        )
        assert sums == (masked_crc32c(data[:8]), masked_crc32c(body))
        events.append(Event.FromString(body))
        data = data[16 + length :]
    version, start, *steps = events
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (2, SessionLog.START)
    told = [[(v.tag, v.simple_value) for v in event.summary.value] for event in steps]
    assert told == [[("toy/loss", 1.5)], [("toy/loss", 2.5)]]
    assert [event.step for event in steps] == [2, 3]
