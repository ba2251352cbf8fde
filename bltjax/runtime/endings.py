"""Ends a command that is interrupted, or whose output is gone, with one line and a known exit code.

By itself Python raises an exception wherever it is: a traceback of up to a hundred lines, which a
callback of JAX may swallow, and which waits until a compilation has ended. Exit codes are those of
shells: 128 plus the number of the signal.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from bltjax.runtime.system_errors import in_words

WRITE_FAILED = 2  # exit code: what is printed cannot be written, since the disk is full, say
GRACE_SECONDS = 0.5  # in which the main thread ends the process, unless it is inside compiled code


_stderr = 2  # where the last line goes; aot turns the real one into a file for a while
_installed = False
_once = threading.Lock()
_undone: list[Callable[[], None]] = []


def is_command() -> bool:
    """Returns whether this process was started as `bltjax` or `python -m bltjax.COMMAND`."""
    words = sys.orig_argv
    if "-m" in words[1:-1]:
        return words[words.index("-m", 1) + 1].startswith("bltjax.")
    return len(words) > 1 and os.path.basename(words[1]) == "bltjax"


def install():
    """Handles SIGINT, SIGTERM, closed streams and broken pipes until the process ends.

    A signal that the process was started to ignore stays ignored.
    """
    global _installed, _stderr
    if _installed or threading.current_thread() is not threading.main_thread():
        return
    _installed = True
    _open_streams()
    _stderr = os.dup(2)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    # The handler runs when the main thread is back in Python, which a compilation delays. The
    # number of a signal comes through this pipe at once, to a thread.
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    os.register_at_fork(after_in_child=_forget)  # a child has the pipe, and not the thread


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


def leave(number: int):
    """Ends the process as one that a signal stopped; returns where that is under way."""
    if not _once.acquire(blocking=False):
        return
    for undo in _undone:
        with contextlib.suppress(Exception):
            undo()
    line = f"stopped by {signal.Signals(number).name}\n"
    with contextlib.suppress(OSError):
        os.write(_stderr, ("\n" + line if os.isatty(_stderr) else line).encode())
    os._exit(128 + number)  # not by way of atexit, where JAX and threads may wait


def _stop(number, frame):
    with contextlib.suppress(Exception, SystemExit):  # it may be in the middle of a write
        sys.stdout.flush()
    leave(number)


def _watch(pipe: int):
    asked = 0
    while number := os.read(pipe, 1):
        if signal.getsignal(number[0]) is not _stop:
            continue
        asked += 1
        if asked > 1:
            os._exit(128 + number[0])  # asked twice: without undoing
        time.sleep(GRACE_SECONDS)
        leave(number[0])


def _forget():
    signal.set_wakeup_fd(-1)
    for number, default in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is _stop:
            signal.signal(number, default)


def _open_streams():
    """Puts null devices in the place of closed streams, and notices outputs that are gone.

    A file that is opened would become standard output or error otherwise, and hold what other
    libraries print. Reading the input that was closed is an error.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY)  # the lowest free number: this one
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _text(_Output(1), sys.stdout)
    sys.stderr = _text(_Output(2), sys.stderr)


class _Output(io.FileIO):
    """Standard output or error; ends the command when nobody reads it any more."""

    def __init__(self, number: int):
        super().__init__(number, "wb", closefd=False)

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # for what is left in buffers
            if isinstance(error, BrokenPipeError):
                _end(128 + signal.SIGPIPE)
            elif self.fileno() == 1:
                print(f"error: {in_words(error, 'standard output')}", file=sys.stderr)
                _end(WRITE_FAILED)
            return len(data)  # no command stops because its log cannot be written


def _end(code: int):
    if threading.current_thread() is not threading.main_thread():
        os._exit(code)  # an exception would end this thread alone
    raise SystemExit(code)  # no OSError, which commands take for one of their files


def _text(output: _Output, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """Returns a text stream with the encoding and the buffering of the one before it."""
    if before is None:
        return io.TextIOWrapper(io.BufferedWriter(output), "utf-8", "backslashreplace")
    before.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(output),
        before.encoding,
        before.errors,
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )
