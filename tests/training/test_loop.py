"""The loop in this process: divergence, updates left out, signals, kept checkpoints, metrics."""

import dataclasses
import json
import os
import re
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

from bltjax import sharding
from bltjax.checkpoints.training_state import Checkpoints
from bltjax.config import (
    EntropyModelConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    TransformerConfig,
)
from bltjax.data.batches.lanes import Layout
from bltjax.data.batches.loader import as_batch
from bltjax.data.batches.order import Shuffled
from bltjax.data.sources.units import Document
from bltjax.runtime.signals import Stopped
from bltjax.training import loop
from bltjax.training.loop import MAX_SKIPPED, NonFiniteLoss, Reporting, TrainingData, train
from bltjax.training.metrics import HELD_OUT, MetricsLog, StepMeans
from bltjax.training.optimizer import learning_rate
from bltjax.vocabulary import BYTE_OFFSET

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
    assert 1 in checkpoints.all_steps() and checkpoints.all_steps()[-1] == 2
    checkpoints.close()


def test_divergence_that_a_guard_holds_off_is_told_in_the_end(tmp_path):
    config = dataclasses.replace(
        TRAINING,
        steps=40,
        checkpoint_every=40,
        skip_loss_above=2.0,
        optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=30, weight_decay=0.0),
    )
    why = rf"toy: {MAX_SKIPPED} updates in a row were left out, .* at step {MAX_SKIPPED + 1};"
    with pytest.raises(NonFiniteLoss, match=why):
        train("toy", MODEL, config, data(), tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] is None and last["skipped"] == last["skipped_in_a_row"] > 10


LONG = dataclasses.replace(
    TRAINING, steps=30, checkpoint_every=1000, log_every=5, skip_loss_above=3.0
)
FAR = 15  # a place that is read between the first steps and the last, however far reading is ahead


class Documents:
    """Random ones, a zero byte in the first one only; calls `at_far` where FAR is read."""

    num_places = None

    def __init__(self, at_far):
        random = np.random.default_rng(0)
        texts = [random.integers(1, 256, 40, np.uint8).tobytes() for _ in range(FAR * 4)]
        self.texts, self.at_far = [b"\0" + texts[0], *texts[1:]], at_far

    def __getitem__(self, place):
        if place == FAR:
            self.at_far()
        return 0, Document("", self.texts[place])


def train_long(workdir, at_far=lambda: None):
    """A run whose rows are corrupted: a zero byte as a target is of no vocabulary, its loss NaN."""

    def corrupted(rows, sources):
        batch = as_batch(rows, sources)
        return batch | dict(
            targets=np.where(batch["targets"] == BYTE_OFFSET, 300, batch["targets"])
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "as_batch", corrupted)
        documents = TrainingData(Documents(at_far), Layout(LONG.row_bytes, pool=2))
        return train("toy", MODEL, LONG, documents, workdir)


def lines_and_parameters(workdir, result):
    """What two runs of the same steps must have in common, bit for bit."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    told = [{k: v for k, v in x.items() if not re.search("second|wait|memory", k)} for x in lines]
    return told, jax.device_get(result.params)


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run gave outside the main thread, and the signal handlers before and in it."""
    workdir, found, during = tmp_path_factory.mktemp("whole"), [], []

    def run():
        with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
            result = train_long(workdir, lambda: during.append(handlers()))
            found.append(lines_and_parameters(workdir, result))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0], during


def test_a_batch_without_a_loss_is_left_out_and_counted(uninterrupted):
    (lines, params), _ = uninterrupted
    assert [line["skipped"] for line in lines] == [1] * 6
    assert [line["skipped_in_a_row"] for line in lines] == [0] * 6
    # Only updates that were made count for the schedule.
    rates = [learning_rate(LONG.optimizer, line["step"] - 1, LONG.steps) for line in lines]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-5)
    assert lines[1]["bits_per_byte/text"] > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_outside_the_main_thread_signals_are_left_alone(uninterrupted):
    assert uninterrupted[1] == [handlers()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_asked_to_stop_it_saves_and_goes_on_as_if_never_stopped(number, uninterrupted, tmp_path):
    strays = []  # signals that found no run to take them
    before = {n: signal.signal(n, lambda *_: strays.append(_)) for n in (15, 2)}
    own = handlers()
    try:
        with pytest.raises(Stopped) as stopped:
            train_long(tmp_path, lambda: os.kill(os.getpid(), number))
        assert handlers() == own and not strays
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    step = int(
        re.search(r"^toy: stopped as asked, step (\d+) of 30 is saved", str(stopped.value))[1]
    )
    assert 5 < step < 25
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == [str(step)]
    ours = lines_and_parameters(tmp_path, train_long(tmp_path))
    assert ours[0] == uninterrupted[0][0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], uninterrupted[0][1])


def test_newest_checkpoints_are_kept_with_every_nth_and_the_last(tmp_path):
    config = dataclasses.replace(TRAINING, steps=7, keep_every=4, keep_checkpoints=1)
    result = train("toy", MODEL, config, data(), tmp_path)
    assert result.compilations == 1
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {4, 7}
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
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the process died here
    log = MetricsLog(tmp_path, "toy", 4, 10)
    log.write(4, values)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1]["grad_norm"] is None  # NaN is not JSON


def test_a_line_is_about_all_steps_since_the_last_one(tmp_path):
    """A run that logs each step is the oracle of one that logs every third."""
    for every in (1, 3):
        config = dataclasses.replace(TRAINING, log_every=every)
        train("toy", MODEL, config, data(), tmp_path / str(every))
    single, lines = (
        [json.loads(line) for line in (tmp_path / every / "metrics.jsonl").open()] for every in "13"
    )
    assert [line["step"] for line in lines] == [2, 5, 7]
    for line, steps in zip(lines, (single[:3], single[3:6], single[6:]), strict=True):
        for name in ("loss", "grad_norm", "byte_utilisation"):
            assert line[name] == pytest.approx(np.mean([step[name] for step in steps]))
        weights = [step["bytes"] for step in steps]
        bits = np.average([step["bits_per_byte"] for step in steps], weights=weights)
        assert line["bits_per_byte"] == pytest.approx(bits)
        assert line["learning_rate"] == steps[-1]["learning_rate"]


def test_means_leave_out_skipped_updates_and_go_on_from_a_state():
    def metrics(loss, skipped=0):
        return dict(loss=loss, bits_per_byte=loss, bytes=2.0, skipped_in_a_row=skipped)

    means = StepMeans()
    means.count(metrics(1.0))
    means = StepMeans(json.loads(json.dumps(means.state)))
    means.count(metrics(3.0))
    means.count(metrics(float("nan"), skipped=1))
    assert means.values() == metrics(2.0, skipped=1)
    means.count(metrics(float("nan"), skipped=2))
    assert np.isnan(means.values()["loss"])
    means.count(metrics(5.0))
    assert means.values() == metrics(5.0)


def test_speed_and_eta_leave_out_what_is_no_training(tmp_path, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    values = dict(loss=1.0, bits_per_byte=2.0, learning_rate=0.1, grad_norm=1.0)
    log = MetricsLog(tmp_path, "toy", 0, 100)
    now = 1000.0  # compiled
    log.restart(0)
    for step, seconds in enumerate((4.0, 2.0)):
        now += seconds
        with log.paused():
            now += 10.0  # held-out rows were measured
        log.count(6)
        log.write(step, values | {HELD_OUT: 3.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["seconds_per_step"] for line in lines] == [4.0, 2.0]
    assert [line["bytes_per_second"] for line in lines] == [1.5, 3.0]
    told = capsys.readouterr().out.splitlines()
    # 98 steps of 13 seconds, since also the measurements will take their time.
    assert told[1].endswith("eta 21m14s") and "held out 3.000" in told[1]


def test_a_run_says_that_it_compiles(tmp_path, capsys):
    """Before each compilation, so that none is silent, and each only once."""
    reporting = Reporting(held_out=lambda params: {HELD_OUT: 3.0})
    config = dataclasses.replace(TRAINING, steps=2, log_every=1, validate_every=1)
    train("toy", MODEL, config, data(), tmp_path, reporting=reporting)
    told = [line for line in capsys.readouterr().out.splitlines() if "compiling" in line]
    for what in ("initialisation", "training step", "held-out step"):
        assert told.pop(0) == f"toy: compiling the {what}"
        assert told.pop(0).startswith(f"toy: compiling the {what} took ")
    assert not told


def test_a_run_goes_on_with_its_own_data_only(tmp_path):
    """What tells the data apart is in each checkpoint; earlier ones have it not."""
    short = dataclasses.replace(TRAINING, steps=2, checkpoint_every=2)
    longer = dataclasses.replace(short, steps=3)
    own = dict(corpus="9f86", threshold=1.5)
    train("toy", MODEL, short, data()._replace(identity=own), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    for name, value in dict(corpus="d081", threshold=1.5000001).items():
        others = data()._replace(identity=own | {name: value})
        told = f"are of the {name} {own[name]}, and that of the run is {value} now: put .* back"
        with pytest.raises(ValueError, match=told):
            train("toy", MODEL, longer, others, tmp_path / "run")
    train("toy", MODEL, longer, data()._replace(identity=own), tmp_path / "same")
    train("toy", MODEL, short, data(), tmp_path / "earlier")
    train("toy", MODEL, longer, data()._replace(identity=own), tmp_path / "earlier")
