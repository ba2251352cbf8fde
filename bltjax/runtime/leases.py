"""Locks in buckets, which have no locks of their own.

A lease is an object that is created on the condition that there is none. It holds host, process and
a token, and a thread writes it anew every HEARTBEAT_SECONDS. Who finds it may take it over where it
has not changed for STALE_SECONDS by the finder's own clock, or at once where the process was on
this machine and is gone. A process that loses its lease ends with one line: another one has its
place.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from bltjax.runtime import buckets

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 60.0
LOST_SECONDS = 45.0  # without a heartbeat that arrived; before others may take it over
BEAT_SECONDS, AGAIN_SECONDS = 8.0, 1.0  # that a heartbeat is tried, and until the next try
LOST = 1  # exit code: as after a crash, the same command goes on

_held: set[str] = set()  # tokens of this process
_leases: set["Lease"] = set()  # those that are not released
_seen: dict[str, tuple[int, float]] = {}  # by path: generation of another's lease, since when


class Lease:
    """A lease that this process has, until it is released; a context that releases it."""

    def __init__(self, path: Path, token: str, generation: int):
        self.path, self._token, self._generation = path, token, generation
        self._written, self._ended = time.monotonic(), threading.Event()
        self._renewing = threading.Lock()
        _leases.add(self)
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"lease {path}")
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        _leases.discard(self)
        with contextlib.suppress(OSError):  # it ends by itself
            buckets.delete(self.path, self._generation)
        _held.discard(self._token)

    def renew(self):
        """Writes the lease anew. Ends the process where another one has taken it over.

        Raises OSError where the bucket does not answer.
        """
        with self._renewing:
            began = time.monotonic()
            try:
                self._generation = buckets.write(
                    self.path, _content(self._token), self._generation, BEAT_SECONDS
                )
                self._written = began
            except buckets.Changed:
                if not self._adopted():
                    _lose(f"{self.path} was taken over by another process: see to that one")

    def _beat(self):
        pause = HEARTBEAT_SECONDS
        while not self._ended.wait(pause):
            pause = HEARTBEAT_SECONDS
            try:
                self.renew()
            except OSError as error:
                pause = AGAIN_SECONDS
                if time.monotonic() - self._written > LOST_SECONDS:
                    _lose(f"for {LOST_SECONDS:.0f} s {error}")

    def _adopted(self) -> bool:
        """Returns whether the lease is ours after all: a write whose answer did not arrive."""
        with contextlib.suppress(OSError, ValueError):
            found = buckets.read_object(self.path)
            if found and _read(found[0]).get("token") == self._token:
                self._generation, self._written = found[1], time.monotonic()
                return True
            return False
        return time.monotonic() - self._written <= LOST_SECONDS


def confirm():
    """Renews the leases of this process now, before it writes what only their holder may.

    Ends the process where it has lost one, after it was suspended say. Raises OSError where the
    bucket does not answer.
    """
    for lease in list(_leases):
        lease.renew()


def attempt(path: Path) -> Lease | None:
    """Returns a lease; None while another process has it. Raises OSError without permission."""
    generation = _replaceable(path)
    if generation is None:
        return None
    token = secrets.token_hex(8)
    _held.add(token)  # before others can see it
    written = None
    try:
        written = _written(path, token, generation)
    finally:
        if written is None:
            _held.discard(token)
    if written is None:
        return None
    _seen.pop(os.fspath(path), None)
    return Lease(path, token, written)


def _written(path: Path, token: str, generation: int) -> int | None:
    """Writes a lease; returns its generation, None where another process was first."""
    try:
        return buckets.write(path, _content(token), generation)
    except buckets.Changed:
        return None


def owner(path: Path) -> dict:
    """Returns host, pid and machine of the process that has a lease; {} where nobody has."""
    found = buckets.read_object(path)
    return _read(found[0]) if found else {}


def wait_for(path: Path, poll_seconds: float = 0.5) -> Lease:
    """Waits until a lease is free."""
    while (lease := attempt(path)) is None:
        time.sleep(poll_seconds)
    return lease


def attempt_patiently(path: Path, poll_seconds: float = 2.0) -> Lease | None:
    """Returns a lease, also of a process that is gone; None where another one keeps it alive."""
    _seen.pop(os.fspath(path), None)
    told, first = False, None
    while (lease := attempt(path)) is None:
        generation = _seen.get(os.fspath(path), (0, 0.0))[0]
        first = first or generation
        there = owner(path)
        if generation != first or there.get("machine") == _machine():
            return None
        if not told:
            print(
                f"{path} is of process {there.get('pid')} on {there.get('host')}: looking whether "
                f"it lives, for {STALE_SECONDS:.0f} s at most",
                file=sys.stderr,
                flush=True,
            )
        told = True
        time.sleep(poll_seconds)
    return lease


def _replaceable(path: Path) -> int | None:
    """Returns the generation of the lease that may be replaced, 0 for none; None: it is alive."""
    found = buckets.read_object(path)
    if found is None:
        return 0
    data, generation = found
    if _is_gone(_read(data)):
        return generation
    name = os.fspath(path)
    if _seen.get(name, (0, 0.0))[0] != generation:
        _seen[name] = (generation, time.monotonic())
    return generation if time.monotonic() - _seen[name][1] >= STALE_SECONDS else None


def _is_gone(there: dict) -> bool:
    """Returns whether a process was on this machine and is not there any more."""
    if there.get("machine") != _machine() or not isinstance(there.get("pid"), int):
        return False
    if there["pid"] == os.getpid():
        return there.get("token") not in _held
    return _born(there["pid"]) != there.get("born")


def _content(token: str) -> bytes:
    pid = os.getpid()
    here = dict(host=socket.gethostname(), pid=pid, machine=_machine(), born=_born(pid))
    return json.dumps(here | dict(token=token, time=time.time())).encode()


def _read(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _machine() -> str:
    """Returns what processes that see each other's numbers have in common."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        boot += " " + os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot}"


def _born(pid: int) -> str:
    """Returns when a process of this machine began, in its own units; "" where there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]  # those have ended
    except (OSError, IndexError, ValueError):
        return ""


def _lose(reason: str):
    print(
        f"error: this process stops before another one takes its place: {reason}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)
