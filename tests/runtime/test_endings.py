"""A command that a signal ends: what it began is undone, wherever the signal comes."""

import signal
import subprocess
import sys
import time

import pytest

from bltjax.runtime import endings, signals
from tests.processes import ROOT

# Begins a directory, says so, and then does what the test wants.
COMMAND = """
import gc, hashlib, os, sys, time
from pathlib import Path
from bltjax.runtime import endings
from bltjax.runtime.files import new_directory
endings.install()
with new_directory(Path(sys.argv[1])) as directory:
    (directory / "half").write_text("half")
    print("begun", flush=True)
    exec(sys.argv[2])
print("done")
"""
DOING = {
    "in Python": "time.sleep(60)",
    "inside compiled code, which returns late": "hashlib.pbkdf2_hmac('sha512', b'', b'', 10**8)",
    "inside a callback of the garbage collector": (
        "gc.callbacks.append(lambda *_: time.sleep(60)); gc.collect()"
    ),
    "swallowing exceptions": "\\nwhile True:\\n  try: time.sleep(1)\\n  except BaseException: pass",
    "writing to a reader that sleeps": "\\nwhile True: print('x' * 999)",
}


@pytest.mark.parametrize("doing", DOING)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_begun_is_undone(doing, number, tmp_path):
    code = DOING[doing].replace("\\n", "\n")
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, tmp_path / "target", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"begun\n"
    assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
    time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    assert process.stderr.read().decode() == f"stopped by {signal.Signals(number).name}\n"
    assert list(tmp_path.iterdir()) == []
    process.stdout.close()
    process.stderr.close()


UNDOES_SLOWLY = """
import os, time
from bltjax.runtime import endings, signals
endings.install()
def undo():
    os.write(1, b"undoing\\n")  # a print may be in the middle of another one
    time.sleep(60)
with signals.undoing(undo):
    print("begun", flush=True)
    time.sleep(60)
"""


def test_a_second_ctrl_c_waits_for_nothing_and_a_second_sigterm_changes_nothing():
    process = subprocess.Popen(
        [sys.executable, "-c", UNDOES_SLOWLY],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"undoing\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == signals.INTERRUPTED and out == b""
    assert err == b"ended by a second Ctrl-C: run the same command again\n"


def test_what_is_a_command(monkeypatch):
    for words, is_command in (
        (["python", "-m", "bltjax.score", "--input=x"], True),
        (["python", "-u", "-m", "bltjax.train"], True),
        (["/venv/bin/python", "/venv/bin/bltjax", "score"], True),
        (["python", "-m", "pytest", "bltjax.py"], False),
        (["python", "-c", "from multiprocessing.spawn import spawn_main", "bltjax"], False),
        (["python", "mine.py"], False),
        (["python"], False),
        (["python", "-m"], False),
    ):
        monkeypatch.setattr("sys.orig_argv", words)
        assert endings.is_command() == is_command, words
