"""The command that generates: what it shows, tells and refuses, around a model that writes."""

import contextlib
import json
import os
import pty
import subprocess
import sys

import pytest

from bltjax import cli
from bltjax.inference.jobs import Counts
from tests.processes import ROOT

# In the place of bltjax.api, in a process of its own: the command is about what is around it.
STAND_IN = """
import runpy, sys, types
def load(path, *, entropy_model, adapter, dtype, bf16_compat, on_progress):
    from tests.commands.test_generate import FakeModel
    return FakeModel()
sys.modules["bltjax.api"] = types.SimpleNamespace(load=load)
sys.modules["bltjax.checkpoints.formats"] = types.SimpleNamespace(stored_bytes=lambda directory: 0)
import bltjax
import bltjax.checkpoints
bltjax.api = sys.modules["bltjax.api"]
bltjax.checkpoints.formats = sys.modules["bltjax.checkpoints.formats"]
sys.argv = ["generate", *sys.argv[1:]]
runpy.run_module("bltjax.generate", run_name="__main__", alter_sys=True)
"""


END = b"\x1b]0;x\x07\xe2\x80\xae\xff"


class FakeModel:
    """Says its options, then a character in two halves, then what steers a terminal or is none."""

    def stream(self, prompt, **options):
        said = f"<{prompt!r} {options}>".encode()
        if options["temperature"] > 9:
            raise ValueError("temperature is too high: lower it")
        return self.pieces(said)

    def pieces(self, said):
        for n, piece in enumerate([said, "é".encode()[:1], "é".encode()[1:], END], 1):
            yield piece, Counts(n, 2 * n, 3 * n, 1, 4, 5 * n, n)


def run(*arguments, stdin=b""):
    command = [sys.executable, "-c", STAND_IN, "--checkpoint=docs", *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True)


def test_text_in_whole_characters_then_counts_then_json():
    process = run("--prompt=ab", "--seed=3", "--stop=x", "--stop=yz", "--top_k=5")
    assert (process.returncode, process.stderr) == (0, b"")
    shown, told, stacks, drafts, found = process.stdout.splitlines()
    assert shown.endswith(b">\xc3\xa9" + END)  # a pipe gets the bytes
    shown, told, stacks, drafts = (
        line.decode(errors="replace") for line in (shown, told, stacks, drafts)
    )
    assert shown.startswith("ab<b'ab' {'temperature': 0.0, 'top_k': 5, 'top_p': None")
    assert "'stop': ['x', 'yz'], 'threshold': None, 'max_drafts': 0, 'blocks': 0, " in shown
    assert "'max_new_bytes': 256, 'seed': 3}>é" in shown
    found = json.loads(found)
    assert told.startswith(f"4 bytes after 2, the first ones after {found['seconds_to_first']:.2f}")
    assert "8 steps; global stack: 4 calls, a patch of" in stacks
    assert drafts == "drafts: 4 of 20 stood (20%)"
    assert found["text"].endswith(">é\\x1b]0;x\\x07\\u202e\\xff")
    assert found["bytes_per_patch"] == pytest.approx(len(shown) / 11, rel=0.1)
    assert (found["patches"], found["prompt_patches"], found["prompt_bytes"]) == (12, 1, 2)


def test_bytes_alone_and_prompts_from_files(tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xfe\n")
    for arguments, stdin in (
        (f"--prompt_file={tmp_path / 'prompt'}", b""),
        ("--prompt_file=-", b"\xfe\n"),
    ):
        process = run("--raw", arguments, stdin=stdin)
        assert process.stdout.startswith(rb"<b'\xfe\n' {")
        assert process.stdout.endswith(b">\xc3\xa9" + END)


@pytest.mark.parametrize(
    "locale", [{}, dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")], ids=["utf-8", "C"]
)
def test_what_is_typed_stays_bytes_and_a_terminal_is_not_steered(locale):
    command = [sys.executable, "-c", STAND_IN, "--checkpoint=docs", b"--prompt=\x1b[2J\xff\xc3\xa9"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*command, b"--stop=s\xff", "--stop=é"], cwd=ROOT, stdout=theirs, env=os.environ | locale
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(ours, 10_000):
            shown += piece
    os.close(ours)
    assert process.wait() == 0
    assert not set(b"\x1b\x07\xff") & set(shown)
    first = shown.decode().splitlines()[0]
    accented = "\\xe9" if locale else "é"  # what the terminal can show
    assert first.startswith(rf"\x1b[2J\xff{accented}<b'\x1b[2J\xff\xc3\xa9'")
    assert first.endswith(rf">{accented}\x1b]0;x\x07\u202e\xff")
    typed = ["s\udcff", "\udcc3\udca9" if locale else "é"]
    assert f"'stop': {typed!r}" in first.replace("\\\\", "\\")


def test_errors_do_not_steer_a_terminal(capsys):
    with pytest.raises(SystemExit):
        cli.fail(ValueError("no file \x1b[2J\u202e here"))
    assert capsys.readouterr().err == "error: no file \\x1b[2J\\u202e here\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give --checkpoint=DIR and one of --prompt=TEXT and --prompt_file=FILE"),
        (["--prompt=a", "--prompt_file=b"], "give --checkpoint=DIR and one of"),
        (["--prompt_file=missing"], "missing is not there: check the path"),
        (["--prompt=a", "--temperature=10"], "temperature is too high: lower it"),
        (["--prompt=a", "--max_new_bytes=-1"], "max_new_bytes"),
    ],
)
def test_wrong_input_is_one_line(arguments, said):
    process = run(*arguments)
    assert not process.stdout  # not the prompt either
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert said in process.stderr.decode()
