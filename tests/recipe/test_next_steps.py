"""What a finished run tells to do next are commands and flags that there are."""

import re
import shlex
from pathlib import Path

import pytest

import bltjax
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.recipe.next_steps import next_steps

PACKAGE = Path(bltjax.__file__).parent


@pytest.mark.parametrize(
    ("models", "commands"),
    [
        (["entropy_model"], ["train"]),
        (["entropy_model", "blt"], ["generate", "evaluate", "patches"]),
        (["token_model"], ["generate", "evaluate"]),
    ],
)
def test_next_steps_are_real_commands(tmp_path, models, commands):
    directory = RunDirectory(tmp_path / "my run")
    for name in models:
        (directory.path / name / "checkpoints" / "4").mkdir(parents=True)
    title, *lines = next_steps(directory, prompt="it's ").splitlines()
    words = [shlex.split(line) for line in lines]
    assert title == "next:" and [line[:2] for line in words] == [["bltjax", c] for c in commands]
    for _, command, *flags in words:
        assert command != "generate" or "--prompt=it's " in flags
        code = (PACKAGE / "commands" / f"{command}.py").read_text()
        code += (PACKAGE / "cli.py").read_text()
        defined = re.findall(r'(?:DEFINE_\w+|define_path)\(\s*"(\w+)"', code)
        assert {flag.partition("=")[0] for flag in flags} <= {f"--{name}" for name in defined}
        assert any(flag.endswith(f"={directory.path}") for flag in flags)
