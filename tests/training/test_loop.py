"""The loop in this process: divergence, kept checkpoints, metrics."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from bltjax.config import EntropyModelConfig, OptimizerConfig, TrainingConfig, TransformerConfig
from bltjax.data.lanes import Layout
from bltjax.data.mixture import Shuffled
from bltjax.data.sources import Document
from bltjax.training.checkpoint import Checkpoints
from bltjax.training.loop import NonFiniteLoss, TrainingData, train
from bltjax.training.metrics import MetricsLog, format_seconds

MODEL = EntropyModelConfig(
    transformer=TransformerConfig(dim=8, num_heads=1, window=8, ffn_multiple_of=8)
)
TRAINING = TrainingConfig(
    steps=8,
    batch_size=2,
    row_bytes=16,
    log_every=3,
    checkpoint_every=2,
    keep_checkpoints=2,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
)


def data(num_sources=1, workers=0):
    random = np.random.default_rng(0)
    documents = [Document("", random.bytes(40)) for _ in range(20)]
    sources = [documents[i::num_sources] for i in range(num_sources)]
    names = tuple(f"source{i}" for i in range(num_sources))
    return TrainingData(Shuffled(sources, 0), Layout(TRAINING.row_bytes), names, workers)


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    # Warm-up makes the first update nothing and the second one fatal.
    config = dataclasses.replace(
        TRAINING, optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=6, weight_decay=0.0)
    )
    config = dataclasses.replace(config, checkpoint_every=1)
    with pytest.raises(NonFiniteLoss, match=r"at step 2; the last good checkpoint is .*/1;"):
        train("toy", MODEL, config, data(), tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert 1 in checkpoints.all_steps() and checkpoints.latest_step() == 2
    checkpoints.close()


def test_newest_checkpoints_are_kept_and_the_last_step_saved(tmp_path):
    config = dataclasses.replace(TRAINING, steps=7)
    result = train("toy", MODEL, config, data(), tmp_path)
    assert result.compilations == 1
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {6, 7}
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [2, 5, 6]
    assert any(p.name.startswith("events") for p in (tmp_path / "tensorboard").iterdir())
    again = train("toy", MODEL, config, data(), tmp_path)
    assert again.compilations == 0  # nothing was left to do


def test_sources_are_told_apart_and_counts_resumed(tmp_path):
    config = dataclasses.replace(TRAINING, checkpoint_every=4)
    train("toy", MODEL, config, data(2), tmp_path)
    whole = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    shutil.rmtree(tmp_path / "checkpoints" / "8")  # as if killed after 4, between two lines
    train("toy", MODEL, config, data(2), tmp_path)
    resumed = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    names = [k for k in whole[-1] if "/" in k or k == "bytes"]
    assert len(names) == 5
    assert [[x[k] for k in names] for x in whole] == [[x[k] for k in names] for x in resumed]
    seen = [whole[-1][f"bytes_seen/source{i}"] for i in range(2)]
    assert min(seen) > 50 and 0.85 * 8 * 2 * 16 < sum(seen) <= 8 * 2 * 16
    assert all(0 <= line["data_wait_fraction"] < 1 for line in whole)


def test_metrics_of_an_interrupted_run_are_replaced(tmp_path):
    values = dict(loss=1.0, bits_per_byte=2.0, learning_rate=0.1, grad_norm=float("nan"))
    log = MetricsLog(tmp_path, "toy", 0, 10)
    for step in range(6):
        log.write(step, values)
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # the process died here
    log = MetricsLog(tmp_path, "toy", 4, 10)
    log.write(4, values)
    log.close()
    lines = [json.loads(line) for line in log.path.open()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1]["grad_norm"] is None  # NaN is not JSON


def test_format_seconds():
    assert [format_seconds(s) for s in (9.9, 187, 7500)] == ["9s", "3m07s", "2h05m"]
