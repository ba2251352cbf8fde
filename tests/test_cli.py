"""Flags that the commands share: what a mistyped one is told, and the home directory in paths."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bltjax import api, cli
from bltjax.checkpoints import formats
from tests import processes

# Parses each command line in turn, and prints what became of it.
PARSING = """
import contextlib, io, json, sys
from absl import flags
from bltjax import cli
cli.define_run_flags()
cli.define_model_flags()
flags.DEFINE_integer("rows", None, "")
flags.DEFINE_float("share", None, "")
found = []
for argv in json.loads(sys.argv[1]):
    flags.FLAGS.unparse_flags()
    for name in ("config", "workdir", "checkpoint"):
        flags.FLAGS[name].value = None
    cli._settings.clear()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            cli.parse(["command", *argv])
            config, workdir = cli.read_config(needs_workdir=False)
        found.append([config.blt_training.steps, workdir, flags.FLAGS.checkpoint])
    except SystemExit as ended:
        found.append([ended.code, said.getvalue()])
print(json.dumps(found))
"""
QUICK = "--config=quickstart"
WRONG = {
    "--workdri=x": "Unknown command line flag 'workdri'. Did you mean: workdir ?",
    "--blt_training.steps=3": "'blt_training.steps': did you mean --config.blt_training.steps?",
    "--confg.blt_training.stesp=3": "did you mean --config.blt_training.steps?",
    "--learning_rate=3": "did you mean --config.entropy_training.optimizer.learning_rate, --config",
    "--config.blt_training.stepz=5": "--config.blt_training.stepz is not a setting: did you mean",
    "--config.blt_training.steps=-1": "blt_training.steps=-1 must be positive, at most 2147483647",
    "--config.blt_training.steps": "--config.blt_training.steps has no value",
    "--config.patching.rule=entrpy": "rule",
    "--config=quickstrat": "neither a file nor the name of a config: did you mean quickstart?",
    "--config=/dev/null": "neither a file",
    "--dtype=float8": "float8",
    "--zzz=x": "Unknown command line flag 'zzz': --help lists the flags",
    "--rows=many": "flag --rows=many: must be a whole number",
    "--share=half": "flag --share=half: must be a number",
}


def parsed(*command_lines, **env):
    command = [sys.executable, "-c", PARSING, json.dumps(command_lines)]
    env = processes.environment() | env
    done = subprocess.run(command, cwd=processes.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_flags(tmp_path):
    (tmp_path / "mine.py").write_text("from configs.quickstart import get_config")
    right = [
        ["--config=~/mine.py", "--workdir=~/run", "--checkpoint", "~/a b"],
        ["--config", "quickstart", "--config.blt_training.steps", "7", "--workdir=~nobody_at_all"],
        [QUICK, "--config.blt_training.steps=7", "--config.blt_training.steps=8"],
    ]
    env = dict(HOME=str(tmp_path), PYTHONPATH=str(processes.ROOT))
    found = parsed(*right, *([QUICK, argument] for argument in WRONG), **env)
    home = str(tmp_path)
    assert found[:3] == [
        [480, f"{home}/run", f"{home}/a b"],
        [7, "~nobody_at_all", None],
        [8, None, None],
    ]
    for (argument, wanted), (code, said) in zip(WRONG.items(), found[3:], strict=True):
        assert code == 2, (argument, code)
        assert said.startswith("error: ") and said.count("\n") == 1 and wanted in said, said


@pytest.mark.parametrize("path", ["data.root", "data.records", "tokenizer.path"])
def test_settings_that_are_paths_know_the_home_directory(path, tmp_path, monkeypatch):
    from bltjax import api
    from bltjax.checkpoints.run_directory import RunDirectory
    from bltjax.config import RunConfig, read_config
    from bltjax.data import tokenizer
    from bltjax.data.sources.units import list_units

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "text.txt").write_text("text")
    config = read_config("quickstart", {path: "~/x"})
    assert isinstance(config, RunConfig)
    if path == "data.root":
        (source,) = config.data.named_sources()
        assert [unit.paths for unit in list_units(source, config.data)] == [
            (str(tmp_path / "x" / "text.txt"),)
        ]
    elif path == "data.records":
        assert RunDirectory(tmp_path / "run").records(config) == tmp_path / "x"
    else:
        with pytest.raises(IsADirectoryError, match=str(tmp_path / "x")):
            tokenizer.load(config.tokenizer.path)
        with pytest.raises(ValueError, match=str(tmp_path / "x")):
            api.load("~/x")


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "bltjax.cli", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("bltjax ")


def test_a_checkpoint_that_is_not_there_is_told_before_jax_is_loaded(tmp_path):
    (tmp_path / "text").write_text("text")
    model, text = "--checkpoint=nowhere", str(tmp_path / "text")
    for name, *arguments in (
        ("chat", model),
        ("convert", "--source=nowhere", f"--target={tmp_path / 'made'}", "--format=hf"),
        ("evaluate", model, f"--data={text}"),
        ("generate", model, "--prompt=a"),
        ("patches", model, f"--input={text}"),
        ("score", model, f"--input={text}"),
        ("serve", model, "--port=0"),
    ):
        command = [sys.executable, "-X", "importtime", "-m", f"bltjax.{name}", *arguments]
        env = processes.environment()
        done = subprocess.run(command, cwd=processes.ROOT, env=env, capture_output=True, text=True)
        lines = done.stderr.splitlines()
        told = [line for line in lines if not line.startswith("import time:")]
        assert done.returncode == 2, (name, told)
        assert len(told) == 1 and told[0].startswith("error: no directory nowhere: give"), told
        assert not [line for line in lines if line.split("|")[-1].strip() == "jax"], name


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_that_the_model_is_compiled(terminal, monkeypatch, capsys):
    given = dict(entropy_model=None, adapter=None, dtype=None, bf16_compat=False)
    chosen = SimpleNamespace(checkpoint="demo", **given)
    monkeypatch.setattr(cli.flags, "FLAGS", chosen)
    monkeypatch.setattr(formats, "stored_bytes", lambda path: 0)
    monkeypatch.setattr(api, "load", lambda *_, **__: "a model")
    bar = SimpleNamespace(update=None, close=lambda: None)
    monkeypatch.setattr(cli, "progress_bar", lambda *_: bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert cli.open_model() == "a model"
    assert ("compiled" in capsys.readouterr().err) is terminal
