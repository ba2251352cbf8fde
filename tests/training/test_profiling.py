"""Traces, memory, and what a run's metrics say of them."""

import json
import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    HashConfig,
    OptimizerConfig,
    PatchingConfig,
    ProfileConfig,
    TrainingConfig,
    TransformerConfig,
)
from bltjax.costs.peak import peak_flops
from bltjax.data.batches.lanes import Layout
from bltjax.data.batches.order import Shuffled
from bltjax.data.sources.units import Document
from bltjax.training.loop import Reporting, TrainingData, train
from bltjax.training.profiling import Profiler, memory

pytestmark = pytest.mark.long  # one interpreter will do

FLOPS_PER_BYTE = 1e6

STACK = TransformerConfig(dim=8, num_layers=1, num_heads=1, ffn_multiple_of=8)
BLT = BLTConfig(
    local_encoder=STACK,
    global_transformer=STACK,
    local_decoder=STACK,
    cross_attention=CrossAttentionConfig(encoder=False, decoder=False),
    hash=HashConfig(()),
    pooling="max",
)
TRAINING = TrainingConfig(
    steps=6,
    batch_size=2,
    row_bytes=32,
    row_patches=20,
    log_every=2,
    checkpoint_every=6,
    optimizer=OptimizerConfig(warmup_steps=1),
)


def traced_steps(directory, name="train"):
    """Step numbers of what has this name in each trace under a directory."""
    found = []
    for file in sorted(directory.rglob("*.xplane.pb")):
        with warnings.catch_warnings():  # from within jaxlib, of its own types
            warnings.simplefilter("ignore", DeprecationWarning)
            events = [
                dict(event.stats)
                for plane in ProfileData.from_file(str(file)).planes
                for line in plane.lines
                for event in line.events
                if event.name == name
            ]
        found.append(sorted(stats["step_num"] for stats in events))
    return found


def run(profiler, steps):
    double, x = jax.jit(lambda x: x * 2), jnp.ones(8)
    for step in steps:
        with profiler.step(step, x), jax.profiler.TraceAnnotation("work", step_num=step):
            x = double(x)
    profiler.close(x)


@pytest.mark.parametrize(
    "steps, expected",
    [(range(6), [[2, 3, 4]]), (range(4), [[2, 3]]), (range(3, 6), [[3, 4]]), (range(5, 8), [])],
    ids=["all", "the run ends in it", "resumed in it", "resumed after it"],
)
def test_the_steps_that_were_asked_for_are_traced(steps, expected, tmp_path, capsys):
    run(Profiler(ProfileConfig(first_step=2, num_steps=3), "blt", tmp_path), steps)
    assert traced_steps(tmp_path) == traced_steps(tmp_path, "work") == expected
    told = f"trace of steps {expected[0][0]} to {expected[0][-1]}: {tmp_path}\n" if expected else ""
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    "config, stage",
    [(ProfileConfig(first_step=0), "entropy_model"), (ProfileConfig(), "blt"), (None, "blt")],
    ids=["another stage", "no first step", "no config"],
)
def test_nothing_is_traced_unless_asked_for(config, stage, tmp_path):
    run(Profiler(config, stage, tmp_path), range(3))
    assert not list(tmp_path.iterdir())


def test_memory_is_told_in_bytes():
    found = memory()
    assert 1e8 < found["host_memory_bytes"] < 1e12
    assert "device_memory_bytes" not in found  # the CPU's is the host's


def test_devices_that_tell_are_asked_for_the_fullest(monkeypatch):
    devices = [
        types.SimpleNamespace(memory_stats=lambda n=n: dict(peak_bytes_in_use=n)) for n in (5, 7)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory()["device_memory_bytes"] == 7.0


def test_what_a_run_says_of_itself(tmp_path):
    words = b"the quick brown fox jumps over a lazy dog "
    sources = [[Document("", words[i:] + words[:i]) for i in range(n, 40, 2)] for n in (0, 1)]
    layout = Layout(TRAINING.row_bytes, TRAINING.row_patches, PatchingConfig("space"))
    data = TrainingData(Shuffled(sources, 0), layout, ("even", "odd"))
    peak = peak_flops(BLT.compute_dtype)
    reporting = Reporting(FLOPS_PER_BYTE, peak, ProfileConfig(first_step=4, num_steps=9))
    train("blt", BLT, TRAINING, data, tmp_path, reporting=reporting)
    assert traced_steps(tmp_path / "profile") == [[4, 5]]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 3, 5]
    for line in lines:
        assert line.keys() == {
            *("step", "loss", "bits_per_byte", "bits_per_byte/even", "bits_per_byte/odd"),
            *("bytes", "bytes_seen/even", "bytes_seen/odd", "byte_utilisation"),
            *("patch_utilisation", "mean_patch_bytes", "overflow", "grad_norm", "learning_rate"),
            *("bytes_per_second", "bytes_per_second_per_chip", "seconds_per_step"),
            *("data_wait_fraction", "flops_utilisation", "compilations", "host_memory_bytes"),
        }
        assert line["compilations"] == 1
        assert line["loss"] > 0 and line["grad_norm"] > 0
        assert 7 < line["bits_per_byte"] < 9  # nothing is learned yet
        assert 0.8 < line["byte_utilisation"] <= 1 and 0 < line["patch_utilisation"] <= 1
        assert 0 <= line["data_wait_fraction"] < 1
        speed = line["bytes_per_second"]
        assert line["bytes_per_second_per_chip"] == speed / jax.device_count()
        assert line["flops_utilisation"] == pytest.approx(FLOPS_PER_BYTE * speed / peak)
        a_row = TRAINING.batch_size * TRAINING.row_bytes
        assert 0.8 * a_row < speed * line["seconds_per_step"] <= a_row
    seen = [sum(line[f"bytes_seen/{name}"] for name in ("even", "odd")) for line in lines]
    assert seen[-1] > seen[0] >= lines[0]["bytes"]
