"""SIGTERM and Ctrl-C, sent to this very process."""

import functools
import os
import signal
import subprocess
import sys
import threading

import pytest

from bltjax.runtime.signals import INTERRUPTED, STOPPED, Stopped, handling, leaving, noticing
from tests import processes

BOTH = (signal.SIGTERM, signal.SIGINT)
ignoring = functools.partial(handling, signal.SIG_IGN)
said = []
listening = functools.partial(leaving, said.append)  # and going on, as no process does


def handlers():
    return [signal.getsignal(number) for number in BOTH]


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = handlers()
    yield
    found = handlers()
    for number, old in zip(BOTH, before, strict=True):
        signal.signal(number, old)
    assert found == before


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_is_noticed(number):
    with noticing() as notice:
        assert notice.received is None
        signal.raise_signal(number)
        assert notice.received == number
    assert notice.received == number


@pytest.mark.parametrize("first", BOTH)
def test_ctrl_c_after_a_signal_interrupts_at_once(first):
    with pytest.raises(KeyboardInterrupt) as raised, noticing():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(raised.value, Stopped)  # which would say that something is saved


@pytest.mark.parametrize("first", BOTH)
def test_sigterm_after_a_signal_changes_nothing(first):
    """Platforms repeat it, while the run saves."""
    with noticing() as notice:
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)
        assert notice.received is not None


@pytest.mark.parametrize("number", BOTH)
def test_leaving_tells_once_and_raises_nothing(number):
    said.clear()
    with listening():
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert said == [number]


# A process that is asked to stop: where, by which signals, and how it must end.
ASKED = """
import ctypes, gc, hashlib, os, signal, sys, threading, time
from bltjax.runtime import peers, signals
where, numbers = sys.argv[1], [signal.Signals[name] for name in sys.argv[2:]]
def ask():
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.05)
def callback(phase, info):  # as JAX has one
    gc.callbacks.remove(callback)
    ask()
class Deleted:
    def __del__(self):
        ask()
def compiled():  # half a minute in which no handler runs
    hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)
with signals.leaving(peers.stop):
    if where == "callback":
        gc.callbacks.append(callback)
        gc.collect()
    elif where == "destructor":
        Deleted()
    elif where == "exception":
        try:
            ask()
        except BaseException:
            pass
    else:
        threading.Timer(0.2, ask).start()
        if where == "compiled step":
            with signals.noticing():
                compiled()
        else:
            compiled()
print("went on")
"""
FIRST = "stopped by {}: run the same command again\n"
SECOND = "ended by a second Ctrl-C: run the same command again\n"


@pytest.mark.parametrize(
    "where, numbers, code, line",
    [
        ("callback", ["SIGTERM"], STOPPED, FIRST),
        ("destructor", ["SIGINT"], STOPPED, FIRST),
        ("exception", ["SIGTERM"], STOPPED, FIRST),
        ("compiled", ["SIGTERM"], STOPPED, FIRST),
        ("compiled", ["SIGINT", "SIGINT"], INTERRUPTED, SECOND),
        ("compiled step", ["SIGTERM", "SIGINT"], INTERRUPTED, SECOND),
    ],
)
def test_a_process_ends_wherever_it_is_asked_to(where, numbers, code, line):
    run = subprocess.run(
        [sys.executable, "-c", ASKED, where, *numbers],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout, run.stderr) == (code, "", line.format(numbers[0]))


def test_a_stop_is_no_error_that_somebody_could_swallow():
    assert not issubclass(Stopped, Exception)
    assert STOPPED not in (0, 1, 2, 3)  # what other ends of a run say


def test_noticing_within_leaving():
    said.clear()
    with listening():
        with noticing() as notice:
            signal.raise_signal(signal.SIGTERM)
        assert notice.received == signal.SIGTERM and not said
        signal.raise_signal(signal.SIGTERM)
        assert said


def test_leaving_keeps_no_file_and_no_thread():
    def used():
        for thread in threading.enumerate():
            if thread.name.endswith("(_watch)"):
                thread.join(10)
        return len(os.listdir("/dev/fd")), threading.active_count()

    before = used()
    for _ in range(3):
        with listening():
            pass
    assert used() == before


def test_a_block_that_fails_gives_the_handlers_back():
    before = handlers()
    for block in (noticing, listening, ignoring):
        with pytest.raises(OSError, match="disk"), block():
            assert handlers() != before
            raise OSError("disk")
        assert handlers() == before


def test_signals_are_ignored_where_the_handler_says_so():
    with ignoring():
        for number in BOTH:
            signal.raise_signal(number)


def test_other_threads_take_no_signals():
    seen = []

    def work():
        for block in (noticing, listening, ignoring):
            with block() as notice:
                seen.append((handlers(), getattr(notice, "received", None)))

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)] * 3
