"""Which models a choice of stages uses, and what must be there for them."""

import dataclasses

import pytest

from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import PatchingConfig, RunConfig
from bltjax.config.data import DataConfig, SourceConfig
from bltjax.recipe.checks import check_sources, check_stages, used_models

SPACE = PatchingConfig(rule="space")


def config(*stages, patching=PatchingConfig()):
    return dataclasses.replace(RunConfig(), stages=stages, patching=patching)


@pytest.mark.parametrize(
    ("stages", "patching", "used"),
    [
        (("entropy_model",), PatchingConfig(), ["entropy_model"]),
        (("entropy_model", "evaluate"), PatchingConfig(), ["entropy_model"]),
        (("entropies",), PatchingConfig(), ["entropy_model"]),
        (("blt",), PatchingConfig(), ["entropy_model", "blt"]),
        (("blt", "evaluate"), SPACE, ["blt"]),
        (("evaluate",), PatchingConfig(), ["entropy_model", "blt"]),
        (("sample",), SPACE, ["blt"]),
    ],
)
def test_used_models(stages, patching, used):
    assert used_models(config(*stages, patching=patching)) == used


def test_a_stage_left_out_must_have_been_done(tmp_path):
    directory = RunDirectory(tmp_path)
    check_stages(config("entropy_model", "entropies", "blt"), directory)
    with pytest.raises(ValueError, match="need a trained entropy_model"):
        check_stages(config("blt"), directory)
    (tmp_path / "entropy_model" / "checkpoints" / "100").mkdir(parents=True)
    check_stages(config("blt"), directory)
    with pytest.raises(ValueError, match="need a trained blt"):
        check_stages(config("evaluate"), directory)


def test_a_wrong_field_shows_early_in_a_dataset_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"body": "text"}\n')
    source = SourceConfig(path=str(tmp_path / "d"), kind="huggingface")
    run = dataclasses.replace(RunConfig(), data=DataConfig(sources=(source,)))
    with pytest.raises(ValueError, match=r"no field 'text' or 'content'.*are 'body'.*text_fields"):
        check_sources(run, RunDirectory(tmp_path / "run"))
