"""Tasks are shared by whoever is there, done once, and taken over from the dead."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bltjax.runtime import files
from bltjax.runtime.system_errors import UnwritableError

ROOT = Path(__file__).parents[2]


def share(tmp_path, tasks, do, **kwargs):
    files.share(
        tasks,
        is_done=lambda task: (tmp_path / task).exists(),
        do=do,
        lock=lambda task: tmp_path / f"locks/{task}",
        **{"poll_seconds": 0.01, **kwargs},
    )


def test_each_task_is_done_once_and_all_wait_for_all(tmp_path):
    tasks = [f"t{i}" for i in range(12)]
    done = []

    def work(_):
        def do(task):
            done.append(task)
            time.sleep(0.01)
            (tmp_path / task).touch()

        share(tmp_path, tasks, do)
        assert all((tmp_path / task).exists() for task in tasks)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(done) == sorted(tasks)


def test_tasks_are_taken_in_order_and_done_ones_left(tmp_path):
    (tmp_path / "b").touch()
    done = []

    def do(task):
        done.append(task)
        (tmp_path / task).touch()

    share(tmp_path, "abc", do)
    assert done == ["a", "c"]


def test_a_task_done_while_its_lock_was_sought_is_left(tmp_path):
    answers = iter([False, True])
    files.share(["a"], lambda _: next(answers), pytest.fail, lambda task: tmp_path / task)
    assert not list(answers)


HOLDER = """
import sys, time
from bltjax.runtime import files
def hold(task):
    print("held", flush=True)
    time.sleep(60)
files.share(["a"], lambda task: False, hold, lambda task: __import__("pathlib").Path(sys.argv[1]))
"""


def test_a_task_is_taken_over_from_a_process_that_died(tmp_path):
    lock = tmp_path / "locks/a"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    done = []

    def do(task):
        done.append(task)
        (tmp_path / task).touch()

    waiting = threading.Thread(target=share, args=(tmp_path, "ab", do))
    waiting.start()
    while done != ["b"]:
        time.sleep(0.01)
    time.sleep(0.05)
    assert done == ["b"] and waiting.is_alive()
    holder.send_signal(signal.SIGKILL)
    waiting.join(10)
    assert done == ["b", "a"]
    holder.communicate()


def test_a_failure_comes_through_and_frees_the_task(tmp_path):
    def fail(task):
        raise RuntimeError(f"no {task}")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no a"):
            share(tmp_path, "a", fail)
    share(tmp_path, "a", lambda task: (tmp_path / task).touch())


FORKING = """
import os, pathlib, sys, time
from bltjax.runtime import files
lock = lambda task: pathlib.Path(sys.argv[1])
children = []
def fork(task):
    children.append(os.fork())
    if not children[-1]:
        time.sleep(60)
files.share(["a"], lambda task: bool(children), fork, lock)
files.share(["b"], lambda task: len(children) > 1, children.append, lock)
os.kill(children[0], 9)
"""


def test_a_child_that_outlives_its_task_does_not_hold_it(tmp_path):
    command = [sys.executable, "-c", FORKING, str(tmp_path / "lock")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=20)


OWNER = """
import pathlib, sys, time
from bltjax.runtime import files
with files.owning(pathlib.Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(60)
"""


def test_a_directory_has_one_owner_until_that_dies(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "owned\n"
    told = f"{tmp_path} is in use by process {owner.pid} on {socket.gethostname()}: wait for it"
    for _ in range(2):
        with pytest.raises(BlockingIOError, match=re.escape(told)), files.owning(tmp_path):
            pass
    with files.alone(tmp_path):  # others may go on sharing it
        pass
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    for _ in range(2):
        with files.owning(tmp_path):
            pass


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            '{"host": "far-away", "pid": 7}',
            r"process 7 on far-away.*for good: delete .*\.lock",
        ),
        ("", "in use by another process: wait"),
        ("[]", "in use by another process: wait"),
        ("\0", "in use by another process: wait"),
    ],
)
def test_an_owner_elsewhere_or_unknown(tmp_path, content, told):
    with files.owning(tmp_path):
        (tmp_path / files.OWNER).write_text(content)
        with pytest.raises(BlockingIOError, match=told), files.owning(tmp_path):
            pass


def test_a_directory_that_is_gone_is_not_made_anew(tmp_path):
    gone = tmp_path / "gone"
    for asked in (files.alone, files.owning):
        with pytest.raises(UnwritableError, match=r"gone .*put the directory back"), asked(gone):
            pass
    assert not gone.exists()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, dict(a=1))
    old = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UnwritableError, match=r"a\.json \(No space left.*\): free some disk space"):
        files.write_json(path, dict(a=2))
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.json"]
