"""Handles SIGTERM and Ctrl-C: a run that is asked to stop saves first, then ends with STOPPED.

Platforms announce a preemption by SIGTERM: Kubernetes, Slurm (`--signal=TERM@120`), spot machines.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable

STOPPED = 75  # exit code: asked to stop and stopped; run the same command again
INTERRUPTED = 128 + signal.SIGINT  # exit code: Ctrl-C a second time
GRACE_SECONDS = 0.5  # in which the main thread ends the process, unless it is in compiled code


class Stopped(KeyboardInterrupt):
    """Raised when a run has stopped as it was asked to; the message says what is saved."""


class Notice:
    """Signal handler that keeps the number of the signal it received."""

    def __init__(self, again: Callable[[], None]):
        self.received: int | None = None
        self._again = again

    def __call__(self, number, frame):
        if self.received is not None and number == signal.SIGINT:
            self._again()
        self.received = number


class Leaving:
    """Signal handler that ends the process by `leave(message)`, once."""

    def __init__(self, leave: Callable[[str], None]):
        self._leave, self._once = leave, threading.Lock()

    def __call__(self, number, frame):
        if self._once.acquire(blocking=False):
            self._leave(f"stopped by {signal.Signals(number).name}: run the same command again")


@contextlib.contextmanager
def noticing():
    """Yields a Notice that takes both signals until the block ends, for the block to look at.

    A second Ctrl-C interrupts at once; within `leaving` it ends the process. Outside the main
    thread, which alone receives signals, none is taken.
    """
    within = isinstance(signal.getsignal(signal.SIGTERM), Leaving)
    with handling(Notice(_end if within else _interrupt)) as notice:
        yield notice


@contextlib.contextmanager
def leaving(leave: Callable[[str], None]):
    """Calls `leave(message)`, which ends the process, wherever the block is when a signal comes.

    No exception is raised: one that comes up in a callback, such as JAX's for the garbage
    collection, is swallowed there, and the run would go on. A thread calls `leave` where the main
    thread stays in compiled code, and ends the process at a second Ctrl-C, inside `noticing` too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handling(Leaving(leave)) as handler:
        # Python writes the number of each signal to this pipe at once, whatever the main thread is
        # doing; handlers run when that thread is back in Python, which a compilation delays.
        read, write = os.pipe()
        os.set_blocking(write, False)
        threading.Thread(target=_watch, args=(read, handler), daemon=True).start()
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(write)


def _watch(pipe: int, handler: Leaving):
    first, waiting = None, False
    while True:
        ready, _, _ = select.select([pipe], [], [], GRACE_SECONDS if waiting else None)
        if not ready:
            waiting = False
            if signal.getsignal(first) is handler:
                handler(first, None)
            continue
        number = os.read(pipe, 1)
        if not number:
            return os.close(pipe)
        if first is not None and number[0] == signal.SIGINT:
            _end()
        first, waiting = number[0], True


def _interrupt():
    raise KeyboardInterrupt


def _end():
    say("ended by a second Ctrl-C: run the same command again")
    os._exit(INTERRUPTED)


def say(line: str):
    """Writes a line to stderr, below a bar that a terminal shows."""
    with contextlib.suppress(Exception):  # the handler may have come in the middle of a write
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{chr(10) * os.isatty(2)}{line}\n".encode())


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
