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
    """Signal handler that keeps the number of the signal it received."""

    def __init__(self):
        self.received: int | None = None

    def __call__(self, number, frame):
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.received = number


@contextlib.contextmanager
def noticing():
    """Yields a Notice that takes both signals until the block ends, for the block to look at.

    A second Ctrl-C interrupts at once. Outside the main thread, which alone receives signals, none
    is taken.
    """
    with handling(Notice()) as notice:
        yield notice


@contextlib.contextmanager
def interrupting():
    """Raises Stopped wherever the block is when a signal comes."""

    def stop(number, frame):
        raise Stopped(f"stopped by {signal.Signals(number).name}: run the same command again")

    with handling(stop):
        yield


@contextlib.contextmanager
def handling(handler):
    """Gives both signals another handler until the block ends."""
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)
