"""Sets up a process that is a command: signals, closed streams, and outputs that nobody reads.

A command whose output is gone ends without a traceback, and with a known exit code.
"""

import io
import os
import signal
import sys
import threading

from bltjax.runtime import signals
from bltjax.runtime.system_errors import in_words

WRITE_FAILED = 2  # exit code: what is printed cannot be written, since the disk is full, say

_installed = False


def is_command() -> bool:
    """Returns whether this process was started as `bltjax` or `python -m bltjax.COMMAND`."""
    words = sys.orig_argv
    if "-m" in words[1:-1]:
        return words[words.index("-m", 1) + 1].startswith("bltjax.")
    return len(words) > 1 and os.path.basename(words[1]) == "bltjax"


def install():
    """Handles SIGINT, SIGTERM, closed streams and broken pipes until the process ends."""
    global _installed
    if _installed or threading.current_thread() is not threading.main_thread():
        return
    _installed = True
    _open_streams()
    signals.install()


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
