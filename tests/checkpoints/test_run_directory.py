"""A working directory of version 0.1: it opens, goes on, and gives the numbers it gave then.

tests/golden_data/run_of_0_1.tar.xz is a run of tests/configs/tiny.py, with narrower models, that
was stopped at step 15 of 24 of the byte latent transformer. The numbers below were computed by
version 0.1 (commit b30c7b7) from the same files.
"""

import json
import tarfile
from pathlib import Path

import jax
import pytest

import bltjax
from bltjax import sharding
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.recipe.checks import CheckedRun
from bltjax.recipe.stages import run

RUN = Path(__file__).parents[1] / "golden_data" / "run_of_0_1.tar.xz"
TEXT = "The entropy of a text is high where the next byte is hard to guess."
NATS, NUM_PATCHES = 305.6177062988281, 24  # at step 15
NATS_AT_END, BITS_AT_END = 293.88357162475586, 6.335898218392772  # after step 24
THRESHOLD = 5.271484375


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    with tarfile.open(RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    return RunDirectory(tmp_path / "run_of_0_1")


def nats(directory):
    (score,) = bltjax.load(directory.path).score([TEXT])
    assert score.num_patches == NUM_PATCHES
    return score.nats


def test_it_opens_goes_on_and_is_evaluated(directory):
    """Its last steps read the same batches, with the same threshold and entropies."""
    assert nats(directory) == pytest.approx(NATS, rel=1e-6)
    config = directory.config()
    directory.claim(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    result = run(CheckedRun(config, directory, mesh))
    assert result["bits_per_byte"] == pytest.approx(BITS_AT_END, rel=1e-6)
    assert result["threshold"] == directory.threshold() == THRESHOLD
    steps = [json.loads(line)["step"] for line in directory.metrics("blt").open()]
    assert steps == list(range(config.blt_training.steps))
    assert nats(directory) == pytest.approx(NATS_AT_END, rel=1e-6)
