"""Settings in a directory that no model of ours can follow are told when it is read."""

import dataclasses
import functools
import json

import pytest

from bltjax.checkpoints import formats
from bltjax.checkpoints.pytorch import hf_config, meta_config
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.checkpoints.weights import WeightsError
from bltjax.config import BLTConfig, PatchingConfig, RunConfig, to_dict
from tests import directories


@pytest.mark.parametrize("name", ["model.json", "config.json"])
def test_an_unknown_patching_rule(tmp_path, name):
    patching = PatchingConfig("words", target_patch_bytes=None)
    described = {
        "model.json": dict(format=formats.VERSION, blt=BLTConfig(), patching=patching),
        "config.json": dict(config=dataclasses.replace(RunConfig(), patching=patching)),
    }[name]
    described = {k: to_dict(v) if dataclasses.is_dataclass(v) else v for k, v in described.items()}
    (tmp_path / name).write_text(json.dumps(described))
    with pytest.raises(WeightsError, match=rf"{name}: .*'words' is unknown: choose one of entropy"):
        formats.read(tmp_path)


@pytest.mark.parametrize("format", ["bltjax", "hf", "meta"])
def test_a_run_of_a_token_model_has_no_other_format(tmp_path, format):
    run = RunDirectory(tmp_path / "run")
    run.claim(dataclasses.replace(RunConfig(), stages=("token_model", "evaluate")))
    with pytest.raises(WeightsError, match="without a checkpoint yet: train it first"):
        convert(run.path, tmp_path / "target", format)
    (run.path / "token_model" / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(WeightsError, match="token model, which no other format has") as raised:
        convert(run.path, tmp_path / "target", format)
    assert "train it" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_settings_that_cannot_be_read_are_one_problem(tmp_path, content):
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(WeightsError) as raised:
        formats.read(tmp_path)
    assert len(raised.value.problems) == 1


@pytest.mark.parametrize(
    "value, says",
    [("a", "'a' is str, must be int"), (-1, "-1 must be at least 1"), (0, "0 must be at least 1")],
)
def test_lengths_that_are_wrong_are_named_as_they_stand_in_the_file(tmp_path, value, says):
    described = dict(format=formats.VERSION, blt=to_dict(BLTConfig()), lengths=dict(bytes=value))
    (tmp_path / "model.json").write_text(json.dumps(described))
    with pytest.raises(WeightsError, match=rf"- model\.json\.lengths\.bytes={says}"):
        formats.read(tmp_path)


@pytest.mark.parametrize(
    "name, read, field",
    [
        ("meta_A_1b_like", lambda a, p: meta_config.read_blt(a, {}, p), "max_seqlen"),
        ("meta_A_1b_like", lambda a, p: meta_config.read_blt(a, {}, p), "max_encoder_seq_length"),
        ("meta_entropy", meta_config.read_entropy_model, "max_seqlen"),
        ("hf_A_1b_like", hf_config.read, "global_config.max_position_embeddings"),
        ("hf_A_1b_like", hf_config.read, "patcher_config.max_position_embeddings"),
    ],
)
@pytest.mark.parametrize("value", [-1, 0, -1.0, -(2**27)])
def test_published_lengths_are_positive(name, read, field, value):
    settings, problems = directories.settings(name), []
    *groups, last = field.split(".")
    functools.reduce(dict.__getitem__, groups, settings)[last] = value
    assert read(settings, problems) is None
    assert len(problems) == 1 and f"{field}={value} must be at least 1" in problems[0]


def test_rows_of_training_go_through_hugging_faces_format(tmp_path):
    directories.hub(tmp_path / "hf", "hf_A_1b_like", bltjax_row_bytes=512)
    convert(tmp_path / "hf", tmp_path / "ours", "bltjax")
    convert(tmp_path / "ours", tmp_path / "again", "hf")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["bltjax_row_bytes"] == 512
    directories.hub(tmp_path / "published", "hf_A_1b_like")
    convert(tmp_path / "published", tmp_path / "same", "hf")
    assert "bltjax_row_bytes" not in (tmp_path / "same" / "config.json").read_text()
    for directory, row_bytes in dict(ours=512, again=512, published=8192, same=8192).items():
        assert formats.read(tmp_path / directory).lengths.row_bytes == row_bytes


@pytest.mark.parametrize("value", ["a", 4, None, 2**40])
def test_rows_that_nothing_can_be_scored_in_are_one_problem(tmp_path, value):
    directories.hub(tmp_path / "hf", "hf_A_1b_like", bltjax_row_bytes=value)
    with pytest.raises(WeightsError, match=r": config\.bltjax_row_bytes") as raised:
        formats.read(tmp_path / "hf")
    assert len(raised.value.problems) == 1
