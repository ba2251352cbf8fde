"""What is compared when several processes start: one fact for each thing that must be the same."""

import shutil
from pathlib import Path

import pytest

import bltjax
from bltjax.config import RunConfig, from_config_dict
from bltjax.recipe import facts as module
from bltjax.recipe.facts import code_digest, facts
from bltjax.runtime.peers import difference
from tests.configs import tiny


def config(**changes):
    settings = tiny.get_config()
    settings.update_from_flattened_dict({n.replace("__", "."): v for n, v in changes.items()})
    return from_config_dict(RunConfig, settings)


SETTINGS = {
    "blt_training__steps": (24, 25),
    "blt_training__optimizer__learning_rate": (1e-2, 2e-2),
    "mesh__data": (-1, 1),
    "patching__threshold": (1.0, 1.5),
    "data__suffixes": ((".txt",), (".txt", ".c")),
    "stages": (("blt",), ("blt", "evaluate")),
    "data__seed": (0, 1),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_differs_is_named(name):
    ours, theirs = (facts(config(**{name: value}), "runs/a") for value in SETTINGS[name])
    dotted = f"--config.{name.replace('__', '.')}="
    assert difference(ours, theirs, 1).startswith(f"process 0 has {dotted}")
    assert difference(ours, dict(ours), 1) == ""


def test_working_directories_are_compared_and_not_their_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    ours = facts(config(), tmp_path / "a")
    assert difference(ours, facts(config(), tmp_path / "b/../link"), 1) == ""
    said = difference(ours, facts(config(), tmp_path / "b"), 1)
    assert said.startswith(f"process 0 has --workdir={tmp_path}/a and process 1 has --workdir=")


def test_a_change_of_any_code_changes_the_digest(tmp_path, monkeypatch):
    before = code_digest()
    copy = tmp_path / "bltjax"
    shutil.copytree(
        Path(bltjax.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(module.bltjax, "__file__", str(copy / "__init__.py"))
    assert code_digest() == before
    (copy / "model" / "blt.py").write_text((copy / "model" / "blt.py").read_text() + "\n")
    assert code_digest() != before
