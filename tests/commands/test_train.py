"""What the training command says to wrong input: one line, exit code 2, nothing written."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from bltjax.runtime.files import owning
from tests.processes import ROOT, environment

# About files and processes, so one interpreter will do.
pytestmark = pytest.mark.long


def run(*arguments, devices=1):
    return subprocess.run(
        [sys.executable, "-m", "bltjax.train", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env=environment(devices),
    )


CASES = {
    "unknown key": (
        ["--config.blt.hash.vocabb=3"],
        ["--config.blt.hash.vocabb is not a setting", "--config.blt.hash.vocab?"],
    ),
    "wrong type": (["--config.blt.hash.vocab=many"], ["--config.blt.hash.vocab=many", "number"]),
    "group for a value": (["--config.blt=3"], ["--config.blt=3"]),
    "wrong value": (["--config.blt.pooling=sum"], ["blt.pooling='sum'", "max"]),
    "heads": (["--config.blt.local_encoder.num_heads=3"], ["dim=16", "num_heads=3"]),
    "patch budget": (
        ["--config.blt_training.row_patches=65"],
        ["row_bytes=64", "row_patches=65", "lower row_patches"],
    ),
    "mesh": (["--config.mesh.fsdp=3"], ["mesh=(-1, 3, 1)", "1 device"]),
    "tensor axis": (
        ["--config.mesh.data=1", "--config.mesh.tensor=8"],
        ["entropy_model.transformer.num_heads=2", "mesh.tensor=8", "change the model or the mesh"],
    ),
    "row shards": (["--config.mesh.data=8"], ["batch_size=2", "8 row shards"]),
    "stage left out": (
        ["--config.stages=('sample',)"],
        ["need a trained entropy_model", "add the stage"],
    ),
    "patching rule": (["--config.patching.rule=words"], ["rule='words'", "entropy, monotonic"]),
    "mean patch of two thresholds": (
        ["--config.patching.rule=global_monotonic"],
        ["target_patch_bytes=4", "rule='global_monotonic'", "threshold_add"],
    ),
    "bpe without delimiters": (["--config.patching.rule=bpe"], ["delimiters"]),
    "missing corpus": (["--config.data.root=/no/such/corpus"], ["/no/such/corpus"]),
    "empty corpus": (["--config.data.root=EMPTY"], ["EMPTY", "no bytes"]),
    "unknown flag": (["--confg=x"], ["confg"]),
    "stray argument": (["stray"], ["'stray'"]),
    "workdir of something else": (["--workdir=tests"], ["tests is not empty", "--workdir"]),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_line(case, tmp_path):
    settings, wanted = CASES[case]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "nothing.txt").touch()
    settings = [s.replace("EMPTY", str(empty)) for s in settings]
    workdir = tmp_path / "run"
    devices = 8 if any("=8" in setting for setting in settings) else 1
    result = run(
        "--config=tests/configs/tiny.py", f"--workdir={workdir}", *settings, devices=devices
    )
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for text in wanted:
        assert text.replace("EMPTY", str(empty)) in lines[0]
    assert not workdir.exists()


def small_corpus(tmp_path, text="some text, "):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(9):
        (corpus / f"{number}.txt").write_text(text * 30)
    return f"--config.data.root={corpus}"


def test_errors_inside_a_stage_are_one_line_too(tmp_path):
    """An unreachable patch size shows once the entropies are known. The traceback is kept."""
    workdir = tmp_path / "run"
    result = run(
        "--config=tests/configs/tiny.py",
        f"--workdir={workdir}",
        small_corpus(tmp_path),
        "--config.entropy_training.steps=1",
        "--config.patching.target_patch_bytes=5000",
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "target_patch_bytes" in result.stderr and "5000" in result.stderr
    assert "Traceback" in (workdir / "error.log").read_text()


def test_a_run_goes_on_from_its_records_alone(tmp_path):
    """Once they are whole, the corpus they were made of may change or go."""
    arguments = [
        "--config=tests/configs/tiny.py",
        f"--workdir={tmp_path / 'run'}",
        small_corpus(tmp_path),
        "--config.stages=('entropy_model',)",
        "--config.entropy_training.steps=1",
    ]
    assert run(*arguments).returncode == 0
    shutil.rmtree(tmp_path / "corpus")
    assert run(*arguments).returncode == 0
    result = run(*arguments, "--config.data.suffixes=('.md',)")
    assert result.returncode == 2 and "data.suffixes" in result.stderr


def one_step(tmp_path, workdir):
    """Arguments of a run that makes one step of the entropy model."""
    return [
        "--config=tests/configs/tiny.py",
        f"--workdir={workdir}",
        small_corpus(tmp_path),
        "--config.stages=('entropy_model',)",
        "--config.entropy_training.steps=1",
    ]


def test_a_workdir_whose_claim_was_interrupted_or_damaged(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.partial").write_text('{"config": {')
    arguments = one_step(tmp_path, workdir)
    assert run(*arguments).returncode == 0
    (workdir / "config.json").write_text('{"config": {')
    result = run(*arguments)
    assert result.returncode == 2 and "config.json is damaged" in result.stderr


def test_a_working_directory_in_use_is_one_line_and_the_end_of_a_run_names_what_is_next(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    arguments = one_step(tmp_path, workdir)
    with owning(workdir):
        refused = run(*arguments)
    told = f"error: {workdir} is in use by process {os.getpid()} on {socket.gethostname()}: wait"
    assert refused.returncode == 2 and refused.stderr.startswith(told), refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and not (workdir / "error.log").exists()
    ended = run(*arguments)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert sum(line.startswith("stage 1 of 1, entropy_model: ") for line in lines) == 1
    assert lines[-3] == "next:" and f"--workdir={workdir}" in lines[-2]
    assert json.loads(lines[-1])["workdir"] == str(workdir)


@pytest.mark.parametrize("override", [[], ["--config.blt.pooling=mean"]])
def test_missing_config_file(tmp_path, override):
    result = run("--config=configs/no_such.py", f"--workdir={tmp_path / 'run'}", *override)
    assert result.returncode == 2 and "configs/no_such.py" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_missing_flags():
    assert "--workdir" in run("--config=tests/configs/tiny.py").stderr


def test_unreadable_corpus_file(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "gone.txt").symlink_to(corpus / "missing.txt")
    result = run(
        "--config=tests/configs/tiny.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.root={corpus}",
    )
    assert result.returncode == 2 and "gone.txt" in result.stderr, result.stderr


def test_help_answers_without_loading_jax():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train', '--help']\n"
        "try:\n    runpy.run_module('bltjax.train', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print('jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert result.stdout.strip().endswith("False") and "--workdir" in result.stdout
