"""SIGTERM and Ctrl-C: a run that is asked to stop saves first, and ends with a code of its own.

Platforms announce a preemption by SIGTERM: Kubernetes, Slurm (`--signal=TERM@120`), spot machines.
"""

import contextlib
import signal
import threading

STOPPED = 75  # exit code: asked to stop and stopped; run the same command again


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop has stopped; the message says what is saved."""


class Notice:
    """Whether the process was asked to stop while `noticing`."""

    def __init__(self):
        self.received: int | None = None

    def __call__(self, number, frame):
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.received = number


@contextlib.contextmanager
def noticing():
    """A Notice that takes both signals until the block ends; the block looks at it when it can.

    A second Ctrl-C interrupts at once. Outside the main thread, which alone hears of signals,
    nothing is taken and nothing noticed.
    """
    with _handling(Notice()) as notice:
        yield notice


@contextlib.contextmanager
def interrupting():
    """Both signals raise Stopped wherever the block is."""

    def stop(number, frame):
        raise Stopped(f"stopped by {signal.Signals(number).name}: run the same command again")

    with _handling(stop):
        yield


def dying():
    """Both signals end the process at once."""
    return _handling(signal.SIG_DFL)


def ignoring():
    """Neither signal does anything: the process is leaving already."""
    return _handling(signal.SIG_IGN)


@contextlib.contextmanager
def _handling(handler):
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)
