"""Messages between the processes of a run: that they live, what they run, why they end.

A process that fails, or is asked to stop, tells the others, which would otherwise wait for it in a
collective until a timeout: each process prints the failure last, and ends. One that was killed or
has stopped tells nothing: its heartbeats stay away. Everything goes through keys and values of
JAX's coordination service, in process 0.
"""

import contextlib
import json
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from bltjax.runtime.signals import STOPPED, Stopped, handling, say

CRASHED = 1  # exit code
DIFFERENT = 2  # exit code: the processes were started with different commands
LOOK_SECONDS = 1.0  # between heartbeats, and looks for the failure of another process
MISSED_SECONDS = 30  # after which a process whose heartbeats stay away is lost
SUSPECTED_SECONDS = 6.0  # the same, where a collective has failed
AGREE_SECONDS = 60.0  # in which all must have said what they run
LINGER_SECONDS = 5.0  # in which process 0, whom all ask, goes on answering after a failure
FAILURE, FACTS, AGREED = "bltjax/failure", "bltjax/facts", "bltjax/agreed"
ALIVE, MARK = "bltjax/alive", "bltjax/mark"
SEEN = ".seen_by_all"  # a file in the working directory while processes look whether they see it
SEEN_SECONDS = 10.0  # in which a network file system shows it
SUSPECTED = "suspected"  # a name among those that are alive

_together = threading.Event()  # while a failure is told to the others
_leaving = threading.Lock()


@contextlib.contextmanager
def ending_together():
    """Ends all processes, with the first failure, when the block fails in one or one is lost.

    The exit code is that of SystemExit and of `Stopped`, and else CRASHED. In a run of one process
    the error comes through.
    """
    if place()[1] == 1:
        yield
        return
    watch = _Watch()
    _together.set()
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        with handling(signal.SIG_IGN):  # the process is leaving already
            if _may_be_another(error):
                watch.suspect()
            watch.end()  # not to end in the middle of its last words
            leave(**_tell(error))
    finally:
        _together.clear()
        watch.end()


def stop(number: int):
    """Ends this process and all others of its run, since a signal asked one to stop."""
    message = f"stopped by {signal.Signals(number).name}: run the same command again"
    if not _together.is_set():
        say(message)
        os._exit(STOPPED)
    leave(**_tell(Stopped(message)))


def agree(facts: dict[str, str]):
    """Ends all processes, with one line each, where one runs something else than process 0 does."""
    index, count = place()
    if count == 1:
        return
    client().key_value_set(f"{FACTS}/{index}", json.dumps(facts))
    wait = int(1000 * AGREE_SECONDS)
    if index == 0:
        found = ""
        for other in range(1, count):
            theirs = json.loads(client().blocking_key_value_get(f"{FACTS}/{other}", wait))
            found = found or difference(facts, theirs, other)
        client().key_value_set(AGREED, json.dumps(found))
    found = json.loads(client().blocking_key_value_get(AGREED, wait))
    if found:
        leave(DIFFERENT, f"error: {found}\n")


def check_shared(directory: Path):
    """Raises ValueError in a process that does not see the directory of process 0."""
    index, count = place()
    if count == 1:
        return
    mark, wait = directory / SEEN, int(1000 * AGREE_SECONDS)
    if index == 0:
        mark.write_text(secrets.token_hex())
        client().key_value_set(MARK, mark.read_text())
    wanted = client().blocking_key_value_get(MARK, wait)
    until = time.monotonic() + SEEN_SECONDS
    while not _holds(mark, wanted):
        if time.monotonic() > until:
            raise ValueError(
                f"--workdir={directory} of process {index} is not the directory of process 0 with "
                "that name: choose one that all machines see"
            )
        time.sleep(0.2)
    client().wait_at_barrier(MARK, wait)
    if index == 0:
        mark.unlink()


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def difference(ours: dict[str, str], theirs: dict[str, str], other: int) -> str:
    """Returns a line on the first fact that differs from process 0's, or an empty text."""
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return (
                f"process 0 has {name}={ours.get(name)} and process {other} has "
                f"{name}={theirs.get(name)}: start all processes with the same command and code"
            )
    return ""


def leave(code: int, text: str):
    """Ends this process, and not by `sys.exit`, which waits for the others at a barrier."""
    if not _leaving.acquire(blocking=False):
        time.sleep(2 * LINGER_SECONDS)  # another thread is ending the process
    with contextlib.suppress(Exception):  # a signal may have come in the middle of a write
        sys.stdout.flush()
    if place()[0] == 0 and place()[1] > 1:
        time.sleep(LINGER_SECONDS)
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    with open(os.dup(2), "w") as last_words, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # what other threads print now
        last_words.write(text)
    os._exit(code)


class _Watch:
    """Threads that send heartbeats, look for failures, and end this process when there is one."""

    def __init__(self):
        self.over = threading.Event()
        self.answered = time.monotonic()
        self.threads = [
            threading.Thread(target=work, daemon=True) for work in (self.look, self.time)
        ]
        for thread in self.threads:
            thread.start()

    def look(self):
        """Asks process 0 for the failure of another process; process 0 looks at the heartbeats."""
        index, count = place()
        hearts = _Hearts(count)
        while not self.over.wait(LOOK_SECONDS):
            try:
                client().key_value_increment(f"{ALIVE}/{index}", 1)
                if index == 0:
                    lost = hearts.lost(client().key_value_dir_get(ALIVE))
                    if lost:
                        _set_failure(dict(code=CRASHED, text=f"{lost}\n"))
                told = _failure()
            except Exception as error:
                told = dict(code=CRASHED, text=f"{_no_answer(error)}\n")
            self.answered = time.monotonic()
            if told:
                leave(**told)
        with contextlib.suppress(Exception):
            client().key_value_delete(f"{ALIVE}/{index}")

    def time(self):
        """Ends this process when process 0 answers no more, and does not refuse to either."""
        while not self.over.wait(LOOK_SECONDS):
            if time.monotonic() - self.answered > MISSED_SECONDS:
                leave(CRASHED, f"{_no_answer(f'nothing for {MISSED_SECONDS} seconds')}\n")

    def suspect(self):
        """Waits whether another process is lost: then this one is ended by that."""
        with contextlib.suppress(Exception):
            client().key_value_increment(f"{ALIVE}/{SUSPECTED}", 1)
        self.over.wait(SUSPECTED_SECONDS + 4 * LOOK_SECONDS)

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join(LINGER_SECONDS)


class _Hearts:
    """Heartbeats of all processes, as process 0 has seen them change."""

    def __init__(self, count: int):
        self.count, self.seen = count, {}

    def lost(self, found: list[tuple[str, str]]) -> str:
        """Returns a line on a process whose heartbeats stay away, or an empty text."""
        now = time.monotonic()
        found = {key.rsplit("/", 1)[1]: value for key, value in found}
        patience = SUSPECTED_SECONDS if found.pop(SUSPECTED, None) else MISSED_SECONDS
        self.seen = {
            name: self.seen[name] if self.seen.get(name, ("",))[0] == value else (value, now)
            for name, value in found.items()
        }
        silent = [name for name, (_, since) in self.seen.items() if now - since > patience]
        if not silent:
            return ""
        return (
            f"process {silent[0]} of {self.count} is lost: it was killed or stopped, or its "
            "machine is gone: when it is back, run the same command again"
        )


def _no_answer(why) -> str:
    return (
        f"process 0 of {place()[1]} does not answer any more ({' '.join(str(why).split())[:200]}): "
        "read its log, and run the same command again"
    )


def _may_be_another(error: BaseException) -> bool:
    """Returns whether an error may come from a process that is lost, which breaks collectives."""
    from jax.errors import JaxRuntimeError

    text = str(error)
    return (
        isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text
    ) or "Gloo" in text


def _code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else CRASHED
    return STOPPED if isinstance(error, Stopped) else CRASHED


def _tell(error: BaseException) -> dict:
    """Tells the others of an error, unless one of them was first; returns the first failure.

    The first may be why this process failed: one that leaves breaks the collectives of the others.
    """
    index, count = place()
    who = f"process {index} of {count}"
    if isinstance(error, SystemExit):  # a command that has said in one line what is wrong
        said = f"ended: {error.__context__ or f'exit code {error.code}'}\n"
        told = _set_failure(dict(code=_code(error), text=f"{who} {said}"))
        return told | dict(text="") if told["text"].endswith(said) else told
    if isinstance(error, Stopped):
        text = f"{who}: {error}\n"
    else:
        text = f"{who} failed:\n{''.join(traceback.format_exception(error))}"
    return _set_failure(dict(code=_code(error), text=text))


def _set_failure(told: dict) -> dict:
    with contextlib.suppress(Exception):  # another was first, or nobody is left to tell
        client().key_value_set(FAILURE, json.dumps(told))
        return told
    with contextlib.suppress(Exception):
        return _failure() or told
    return told


def _failure() -> dict | None:
    try:
        return json.loads(client().key_value_try_get(FAILURE))
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def place() -> tuple[int, int]:
    """Returns the index of this process, and the number of processes."""
    state = _state()
    return getattr(state, "process_id", None) or 0, getattr(state, "num_processes", None) or 1


def client():
    """Returns the client of the coordination service; None in a process alone."""
    return getattr(_state(), "client", None)


def _state():
    # The coordination service's keys and values have no public name, and the public functions that
    # count processes look for devices first. Not imported here: a signal may come while JAX is.
    return getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
