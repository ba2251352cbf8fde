"""Handles SIGTERM and Ctrl-C: a run that is asked to stop saves first, then ends with STOPPED.

Platforms announce a preemption by SIGTERM: Kubernetes, Slurm (`--signal=TERM@120`), spot machines.
"""

import contextlib
import signal
import threading

STOPPED = 75  # exit code: asked to stop and stopped; run the same command again


class Stopped(KeyboardInterrupt):
    """Raised when a run has stopped as it was asked to; the message says what is saved."""


class Notice:
    """Record of the last signal that asked the process to stop while `noticing`."""

    def __init__(self):
        self.received: int | None = None

    def __call__(self, number, frame):
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.received = number


@contextlib.contextmanager
def noticing():
    """Yields a Notice that takes both signals; the block looks at it when it can.

    A second Ctrl-C interrupts at once. Outside the main thread, which alone hears of signals,
    nothing is taken and nothing noticed.
    """
    with _handling(Notice()) as notice:
        yield notice


@contextlib.contextmanager
def interrupting():
    """Makes both signals raise Stopped wherever the block is."""

    def stop(number, frame):
        raise Stopped(f"stopped by {signal.Signals(number).name}: run the same command again")

    with _handling(stop):
        yield


def dying():
    """Makes both signals end the process at once."""
    return _handling(signal.SIG_DFL)


def ignoring():
    """Makes both signals do nothing: the process is leaving already."""
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
