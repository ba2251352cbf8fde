"""Handles SIGTERM and Ctrl-C: a run that trains saves first, other commands end at once.

By itself Python raises an exception wherever it is: a traceback of up to a hundred lines, which a
callback of JAX may swallow, and which waits until a compilation has ended. Exit codes are those of
shells: 128 plus the number of the signal. Platforms announce a preemption by SIGTERM: Kubernetes,
Slurm (`--signal=TERM@120`), spot machines.
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
DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

_stderr = 2  # where the last line goes; aot turns the real one into a file for a while
_undone: list[Callable[[], None]] = []


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
    """Signal handler that ends the process by `leave(number)`, once."""

    def __init__(self, leave: Callable[[int], None]):
        self._leave, self._once = leave, threading.Lock()

    def __call__(self, number, frame):
        with contextlib.suppress(Exception, SystemExit):  # it may be in the middle of a write
            sys.stdout.flush()  # a reader that sleeps may keep it here: the thread leaves then
        self.leave(number)

    def leave(self, number: int):
        if self._once.acquire(blocking=False):
            self._leave(number)


def install():
    """Has signals end this process, a command, by `end_command`.

    A signal that the process was started to ignore stays ignored.
    """
    global _stderr
    _stderr = os.dup(2)
    _handle(Leaving(end_command), [n for n in DEFAULTS if signal.getsignal(n) != signal.SIG_IGN])
    signal.set_wakeup_fd(_watched(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)  # a child has the pipe, and not the thread


def _forget():
    signal.set_wakeup_fd(-1)
    for number, default in DEFAULTS.items():
        if isinstance(signal.getsignal(number), Leaving):
            signal.signal(number, default)


def end_command(number: int):
    """Undoes what the command has begun and ends it, not by way of atexit, where JAX may wait."""
    for undo in _undone:
        with contextlib.suppress(Exception):
            undo()
    say(f"stopped by {signal.Signals(number).name}")
    os._exit(128 + number)


@contextlib.contextmanager
def undoing(undo: Callable[[], None]):
    """Has `undo()` called where a signal ends the command in the block.

    An exception could undo as well, but one that a signal raises comes up inside callbacks too,
    such as JAX's for the garbage collector: Python drops it there, or C++ aborts.
    """
    _undone.append(undo)
    try:
        yield
    finally:
        _undone.remove(undo)


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
def leaving(leave: Callable[[int], None]):
    """Calls `leave(number)`, which ends the process, wherever the block is when a signal comes.

    A thread calls it where the main thread stays in compiled code, and ends the process at a
    second Ctrl-C, inside `noticing` too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handling(Leaving(leave)):
        pipe = _watched()
        before = signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(pipe)


def _watched() -> int:
    """Returns a pipe for the numbers of signals, to which Python writes whatever it is doing.

    Handlers run when the main thread is back in Python, which a compilation delays.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    return write


def _watch(pipe: int):
    last, waiting = None, False
    while True:
        ready, _, _ = select.select([pipe], [], [], GRACE_SECONDS if waiting else None)
        if not ready:
            waiting = False
            handler = signal.getsignal(last)
            if isinstance(handler, Leaving):
                handler.leave(last)
            continue
        number = os.read(pipe, 1)
        if not number:
            return os.close(pipe)
        if last is not None and number[0] == signal.SIGINT:
            _end()
        last, waiting = number[0], True


def _interrupt():
    raise KeyboardInterrupt


def _end():
    say("ended by a second Ctrl-C: run the same command again")
    os._exit(INTERRUPTED)


def say(line: str):
    """Writes a line to stderr, below a bar that a terminal shows."""
    with contextlib.suppress(OSError):
        os.write(_stderr, f"{chr(10) * os.isatty(_stderr)}{line}\n".encode())


@contextlib.contextmanager
def handling(handler):
    """Gives both signals another handler until the block ends."""
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    before = _handle(handler, DEFAULTS)
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _handle(handler, numbers) -> dict:
    return {number: signal.signal(number, handler) for number in numbers}
