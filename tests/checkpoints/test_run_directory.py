"""A working directory of version 0.1: it opens, goes on, and gives the numbers it gave then.

tests/golden_data/run_of_0_1.tar.xz is a run of tests/configs/tiny.py, with narrower models, that
was stopped at step 15 of 24 of the byte latent transformer. The numbers below were computed by
version 0.1 (commit b30c7b7) from the same files.
"""

import contextlib
import dataclasses
import errno
import json
import os
import random
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

import bltjax
from bltjax import sharding
from bltjax.checkpoints import orbax_weights
from bltjax.checkpoints.run_directory import RunDirectory, saved_steps
from bltjax.checkpoints.weights import WeightsError
from bltjax.config import PatchingConfig, RunConfig, TrainingConfig, to_dict
from bltjax.data.records.store import open_store
from bltjax.recipe.checks import CheckedRun
from bltjax.recipe.stages import run
from bltjax.runtime.checked_json import write_checked
from bltjax.runtime.system_errors import UnwritableError

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


def test_a_run_for_other_devices_opens(directory):
    """The kernel of attention may change, and a model is read without it."""
    config = directory.config()
    blt = dataclasses.replace(config.blt, attention="cudnn", attention_block=256)
    on_gpu = dataclasses.replace(config, blt=blt)
    directory.claim(on_gpu)
    write_checked(directory.path / "config.json", dict(config=to_dict(on_gpu)))
    assert directory.config().blt.attention == "cudnn"
    assert nats(directory) == pytest.approx(NATS, rel=1e-6)


def claim(path):
    RunDirectory(path).claim(RunConfig())


@pytest.mark.parametrize("opened", [claim, open_store, bltjax.load])
def test_a_path_that_is_not_utf8_is_refused_and_nothing_is_called_damaged(tmp_path, opened):
    """Orbax and ArrayRecord cannot open it; they would be told to delete what is whole."""
    claim(tmp_path / "run")
    path = (tmp_path / "run").rename(tmp_path / os.fsdecode(b"r\xfcn"))
    with pytest.raises(ValueError, match="is not UTF-8 in this locale: set PYTHONUTF8=1"):
        opened(path)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """In the settings, the threshold and the rows: an error, or the same values."""
    directory = RunDirectory(tmp_path)
    config = RunConfig(stages=("blt",))
    directory.claim(config)
    directory.write_patching(PatchingConfig(threshold=5.27))
    directory.write_rows(dict(row_bytes=8192, row_patches=1024))
    chance = random.Random(0)
    readers = {"config.json": directory.config, "patching.json": directory.threshold}
    readers["rows.json"] = directory.row_bytes
    for name, read in readers.items():
        path, value = tmp_path / name, read()
        good, noticed = path.read_bytes(), 0
        for bit in chance.sample(range(8 * len(good)), 150):
            path.write_bytes(flipped(good, bit))
            try:
                assert read() == value
            except WeightsError as error:
                noticed += 1
                assert name in str(error)
            if name == "config.json":
                with contextlib.suppress(ValueError):  # another value would be "another config"
                    directory.claim(config)
        assert noticed > 50
        path.write_bytes(good)


def test_a_damaged_config_is_not_another_config(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.claim(RunConfig())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"dim": ', '"dim": 9', 1))
    assert text != (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"config.json is damaged \(its digest.*put the file back"):
        directory.claim(RunConfig())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"threshold": 1.5, "digest": "0"}'])
@pytest.mark.parametrize("name", ["config.json", "patching.json", "rows.json"])
def test_damage_of_any_kind_comes_with_its_remedy(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    read = {
        "config.json": RunDirectory.config,
        "patching.json": RunDirectory.threshold,
        "rows.json": RunDirectory.row_bytes,
    }
    with pytest.raises(WeightsError, match=f"{name} .*: put it back as it was written"):
        read[name](RunDirectory(tmp_path))


def other_config() -> RunConfig:
    return dataclasses.replace(RunConfig(), blt_training=TrainingConfig(steps=7))


def test_a_directory_that_never_trained_takes_other_settings(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(RunConfig())
    (directory.path / "records").mkdir()
    (directory.path / "error.log").touch()
    directory.claim(other_config())
    assert directory.config() == other_config()
    with directory.own(), pytest.raises(ValueError, match="holds a run of another config"):
        directory.claim(RunConfig())  # that run has only begun
    (directory.path / "blt" / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another config \(config.blt_training.steps"):
        directory.claim(RunConfig())


ODD_NAMES = [
    "99999999999",
    "2147483648",
    "007",
    "-3",
    "+5",
    "1_0",
    " 5",
    "5 ",
    "tmp",
    "²",
    "٣",
    "1e3",
]


def test_only_names_of_steps_are_checkpoints(tmp_path):
    for name in [*ODD_NAMES, "0", "12", "2147483647"]:
        (tmp_path / name).mkdir()
    (tmp_path / "9").touch()
    (tmp_path / "16").symlink_to(tmp_path / "gone")
    assert saved_steps(tmp_path) == [0, 12, 2**31 - 1]


def test_what_else_lies_beside_checkpoints_does_no_harm(directory):
    for name in ODD_NAMES:
        (directory.path / "blt" / "checkpoints" / name).mkdir()
    (directory.path / "blt" / "checkpoints" / "23").touch()
    (directory.path / "result.json").write_bytes(b'\xff{"a')
    assert nats(directory) == pytest.approx(NATS, rel=1e-6)


def test_the_threshold_of_another_run_is_noticed(tmp_path):
    """Its digest is right, and the checkpoint knows better."""
    directory = RunDirectory(tmp_path)
    stage = directory.stage(RunConfig(), "blt")
    record = tmp_path / "blt" / "checkpoints" / "4" / "record" / "metadata"
    write_checked(record, dict(step=4, position=dict(threshold=1.5, corpus="9f86")))
    stage.check_data(threshold=1.5, row_bytes=64)  # which earlier ones do not say
    with pytest.raises(ValueError, match=r"threshold 1.5, and .* is 1.6 now: put patching"):
        stage.check_data(threshold=1.6)
    record.write_bytes(record.read_bytes().replace(b"9f86", b"9f87"))
    stage.check_data(threshold=1.6)  # a damaged checkpoint says nothing: reading it is an error


def test_another_value_of_a_parameter_is_noticed_when_a_run_is_loaded(directory, monkeypatch):
    """Orbax stores them without checksums: the fingerprints of the checkpoint tell."""
    read, pieces = orbax_weights._Stored.__getitem__, []

    def damaged(stored, index):
        piece = np.array(read(stored, index))
        if len(pieces) == 5:
            bits = piece.reshape(-1).view(np.uint8)
            bits[len(bits) // 2] ^= 1  # of the smallest there are
        pieces.append(piece)
        return piece

    monkeypatch.setattr(orbax_weights._Stored, "__getitem__", damaged)
    with pytest.raises(WeightsError, match="has other values than were saved: its checkpoint"):
        bltjax.load(directory.path)
    assert nats(directory) == pytest.approx(NATS, rel=1e-6)


def test_flipped_bits_of_the_stored_parameters_are_noticed(directory):
    for file in directory.path.glob("blt/checkpoints/*/state/**/d/*"):
        data = file.read_bytes()
        for bit in random.Random(0).sample(range(8 * len(data)), len(data) // 100):
            data = flipped(data, bit)
        file.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot be read|other values than were saved"):
        bltjax.load(directory.path)


def test_a_directory_that_was_moved_away_can_be_put_back(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(RunConfig())
    away = tmp_path / "away"
    told = (
        "was moved or deleted while the run wrote into it: put the directory back and run it again"
    )
    with pytest.raises(UnwritableError, match=told), directory.own():
        directory.path.rename(away)
        (directory.path / "blt").mkdir(parents=True)  # as threads of Orbax do
        raise ValueError("whatever that leads to")
    assert (tmp_path / "run.remains" / "blt").is_dir()
    away.rename(directory.path)
    with directory.own():
        directory.claim(RunConfig())
    with pytest.raises(KeyError), directory.own():
        raise KeyError("an error that is not about the directory")


def test_a_full_disk_is_one_line_whatever_wrote(tmp_path):
    directory = RunDirectory(tmp_path)
    told = r"No space left on device\): free some disk space"
    with pytest.raises(UnwritableError, match=told), directory.own():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
