"""The loop in this process: divergence, kept checkpoints, metrics."""

import dataclasses
import json

import numpy as np
import pytest

from bltjax.config import EntropyModelConfig, OptimizerConfig, TrainingConfig, TransformerConfig
from bltjax.data.packing import pack_bytes, stack
from bltjax.data.pipeline import batches, whole_batches
from bltjax.training.checkpoint import Checkpoints
from bltjax.training.loop import NonFiniteLoss, train
from bltjax.training.metrics import MetricsLog, format_seconds
from bltjax.vocabulary import encode

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


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    return stack(pack_bytes((encode(random.bytes(40)) for _ in range(20)), TRAINING.row_bytes))


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(rows, tmp_path):
    # Warm-up makes the first update nothing and the second one fatal.
    config = dataclasses.replace(
        TRAINING, optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=6, weight_decay=0.0)
    )
    config = dataclasses.replace(config, checkpoint_every=1)
    with pytest.raises(NonFiniteLoss, match=r"at step 2; the last good checkpoint is .*/1;"):
        train("toy", MODEL, config, rows, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert 1 in checkpoints.all_steps() and checkpoints.latest_step() == 2
    checkpoints.close()


def test_newest_checkpoints_are_kept_and_the_last_step_saved(rows, tmp_path):
    config = dataclasses.replace(TRAINING, steps=7)
    result = train("toy", MODEL, config, rows, tmp_path)
    assert result.compilations == 1
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {6, 7}
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [2, 5, 6]
    assert any(p.name.startswith("events") for p in (tmp_path / "tensorboard").iterdir())
    again = train("toy", MODEL, config, rows, tmp_path)
    assert again.compilations == 0  # nothing was left to do


def test_batches_cover_every_row_once_an_epoch_and_resume_anywhere(rows):
    count = len(rows.tokens)
    stream = batches(rows, 2, seed=1)
    seen = np.concatenate([next(stream)["tokens"] for _ in range(count)])  # two epochs
    position = stream.get_state()
    following = next(stream)["tokens"]
    sorted_rows = sorted(map(tuple, rows.tokens.tolist()))
    for epoch in np.split(seen, 2):
        assert sorted(map(tuple, epoch.tolist())) == sorted_rows
    assert not np.array_equal(*np.split(seen, 2))  # another order
    other = batches(rows, 2, seed=1)
    other.set_state(position)
    np.testing.assert_array_equal(next(other)["tokens"], following)


def test_too_little_text_for_a_batch(rows):
    with pytest.raises(ValueError, match=r"fewer than batch_size=1000"):
        batches(rows, 1000, seed=0)


def test_whole_batches_count_no_row_twice(rows):
    found = list(whole_batches(rows, 7))
    assert all(len(b["tokens"]) == 7 for b in found)
    assert sum(b["loss_mask"].sum() for b in found) == rows.loss_mask.sum()


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
