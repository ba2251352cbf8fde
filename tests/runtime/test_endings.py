"""A signal inside a block that removes what it began, wherever it comes."""

import gc
import os
import signal
import time

import pytest

from bltjax.runtime import endings


def wait():
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_unwinds_the_block(number):
    removed = []
    with pytest.raises(endings.Interrupted) as error, endings.unwinding():
        try:
            os.kill(os.getpid(), number)
            wait()
        finally:
            removed.append("what was begun")
    assert error.value.number == number and removed


def test_a_signal_inside_a_callback_of_the_garbage_collector_is_not_lost():
    """Python prints exceptions of these callbacks, and drops them."""
    sent = []

    def callback(phase, info):
        if not sent:
            sent.append(phase)
            signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(callback)
    try:
        with pytest.raises(endings.Interrupted), endings.unwinding():
            gc.collect()
            wait()
    finally:
        gc.callbacks.remove(callback)
    assert sent


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
