"""The best model by held-out rows, and the early stop."""

import dataclasses

import jax
import numpy as np
import pytest

from bltjax import sharding
from bltjax.checkpoints import formats, training_state
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.run_directory import BEST, CHECKPOINTS, RunDirectory, saved_steps
from bltjax.checkpoints.training_state import load_params
from bltjax.checkpoints.weights import flat
from bltjax.config import RunConfig, TrainingConfig, from_config_dict
from bltjax.model import functional
from bltjax.recipe import stages
from bltjax.recipe.checks import CheckedRun
from bltjax.recipe.stages import run
from bltjax.training.metrics import HELD_OUT
from tests.configs import tiny
from tests.interruptions import interrupted_at
from tests.processes import metrics, write_corpus

pytestmark = pytest.mark.long  # one interpreter will do

BITS = [5.0, 3.0, 4.0, 2.0, 2.5, float("nan"), 2.2, 2.1, 1.0, 1.0, 1.0, 1.0]  # by measurement


@pytest.fixture
def config(tmp_path):
    write_corpus(tmp_path / "corpus")
    given = tiny.get_config()
    given.data.root, given.patching.rule = str(tmp_path / "corpus"), "space"
    given.stages = ("blt",)
    training = given.blt_training
    training.steps, training.validate_every, training.checkpoint_every = 24, 2, 4
    training.keep_best, training.patience, training.keep_every = True, 3, 4
    return from_config_dict(RunConfig, given)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains, with held-out bits per byte that are given; returns the directory."""

    def train(config, name="run", bits=BITS) -> RunDirectory:
        every = config.blt_training.validate_every
        steps = dict(zip(range(every, 1000, every), bits, strict=False))
        seen = []

        def validation(*_):
            def measure(params):
                seen.append(sum(float(x.sum()) for x in jax.tree.leaves(params)))
                return {HELD_OUT: steps[_measured_step(seen, directory, every)]}

            return measure

        directory = RunDirectory(tmp_path / name)
        directory.claim(config)
        monkeypatch.setattr(stages, "validation", validation)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        run(CheckedRun(config, directory, mesh))
        return directory

    return train


def _measured_step(seen: list, directory: RunDirectory, every: int) -> int:
    """The step of the newest of the measurements of this start."""
    begun = max(saved_steps(directory.path / "blt" / CHECKPOINTS), default=0)
    if len(seen) == 1:
        directory.__dict__["begun"] = begun
    return directory.__dict__["begun"] + every * len(seen)


def params_after(directory, config, step) -> dict:
    stage = directory.stage(config, "blt")
    checkpoints = stage.directory / CHECKPOINTS / str(step)
    state, _ = training_state._read(
        checkpoints, {"params": functional.abstract_params(stage.model)}, "params."
    )
    return flat(state["params"])


def test_training_ends_when_nothing_gets_better(config, train, capsys):
    directory = train(config)
    said = capsys.readouterr().out
    assert "blt: ended after 14 of 24 steps, as 3 measurements in a row were no better than" in said
    assert "that after 8" in said.replace("\n", " ")
    assert [line["step"] for line in metrics(directory.path, "blt")] == list(range(14))
    stage = directory.stage(config, "blt")
    assert saved_steps(stage.directory / BEST) == [8]
    assert saved_steps(stage.directory / CHECKPOINTS)[-1] == 14
    assert stage.is_finished()
    # It is over: the same command trains no further.
    before = metrics(directory.path, "blt")
    train(config)
    assert metrics(directory.path, "blt") == before


def test_the_model_of_the_run_is_the_best_one(config, train):
    directory = train(config)
    stage = directory.stage(config, "blt")
    best, newest = params_after(directory, config, 8), params_after(directory, config, 12)
    lazy = flat(formats.read(directory.path).params["blt"])
    for found in (flat(stage.params()), {name: read_all(x) for name, x in lazy.items()}):
        for name, x in found.items():
            np.testing.assert_array_equal(np.asarray(x), np.asarray(best[name]))
    assert any(np.any(np.asarray(best[n]) != np.asarray(newest[n])) for n in best)


def test_without_patience_it_goes_on(config, train):
    training = dataclasses.replace(config.blt_training, patience=0)
    directory = train(dataclasses.replace(config, blt_training=training))
    stage = directory.stage(config, "blt")
    assert saved_steps(stage.directory / CHECKPOINTS)[-1] == 24
    assert saved_steps(stage.directory / BEST) == [18]  # the first of equals


def test_a_stopped_run_remembers_its_best(config, train):
    """Also how long ago that was."""
    whole = train(config, "whole")
    shorter = dataclasses.replace(config.blt_training, steps=24)
    again = dataclasses.replace(config, blt_training=shorter)
    with interrupted_at(12):
        train(again, "again")
    directory = train(again, "again")
    assert metrics(directory.path, "blt") == metrics(whole.path, "blt")
    assert saved_steps(directory.path / "blt" / BEST) == [8]


@pytest.mark.parametrize("changes", [dict(keep_best=True), dict(patience=2)], ids=str)
def test_held_out_rows_have_to_be_measured(changes):
    (problem,) = TrainingConfig(**changes).problems("t")
    assert "goes by held-out rows, which t.validate_every=0 never measures" in problem


def test_the_best_is_read_by_its_path(config, train):
    directory = train(config)
    stage = directory.stage(config, "blt")
    found = load_params(stage.directory / BEST, functional.abstract_params(stage.model))
    assert flat(found).keys() == flat(stage.params()).keys()
