"""Meets all processes of a run at an address before JAX does, which aborts where one is missing.

Process 0 listens at the address until each of the others has said its number, then lets all go on.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import time

TELL_SECONDS = 10  # of waiting, after which a process says for what
HELLO_SECONDS = 5.0  # in which one that connects must have said its number
RETRY_SECONDS = 0.2
LINE_BYTES = 4096
NOT_OURS = "something else answers there"


def answer(host: str, port: int, bound: int, count: int, index: int, seconds: float):
    """Returns when all processes have come.

    bound: the port at which process 0 listens. Raises ValueError where it is taken, where two
    processes have one number or different counts, and where some are missing after `seconds`.
    """
    clock = _Clock(seconds)
    if index:
        return _report(f"{host}:{port}", (host, port), count, index, clock)
    with _listen(bound, count) as server:
        present: dict[int, socket.socket] = {}
        try:
            _gather(server, count, present, f"{host}:{port}", clock)
            _tell(present, "")
        except ValueError as error:
            _tell(present, str(error))
            raise


class _Clock:
    def __init__(self, seconds: float):
        self.seconds, self.began, self.told = seconds, time.monotonic(), False

    def left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def waiting_for(self, what: str):
        """Says once, after a while, what the process is waiting for."""
        if not self.told and self.left() < self.seconds - TELL_SECONDS:
            self.told = True
            print(f"waiting for {what}, {self.seconds:g} seconds at most", file=sys.stderr)


def _listen(port: int, count: int) -> socket.socket:
    families = [(socket.AF_INET, False)]
    if socket.has_dualstack_ipv6():
        families.insert(0, (socket.AF_INET6, True))
    for family, dual in families:
        try:
            return socket.create_server(
                ("", port), family=family, backlog=count, dualstack_ipv6=dual
            )
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None)
            reason = os.strerror(number) if number else str(error)
    raise ValueError(
        f"process 0 cannot listen on port {port} ({reason}): end what uses it, or choose another"
    )


def _gather(server, count: int, present: dict, address: str, clock: _Clock):
    """Fills `present` with the connections of processes 1 to count - 1."""
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while len(present) < count - 1:
            names = _named(sorted(set(range(1, count)) - present.keys()), count)
            if clock.left() <= 0:
                raise ValueError(
                    f"{names} did not come to {address} within {clock.seconds:g} seconds: read "
                    "the logs of all, and start all of them again with the same address"
                )
            clock.waiting_for(f"{names} at {address}")
            for key, _ in selector.select(min(clock.left(), 1.0)):
                if key.fileobj is server:
                    came = _hello(server)
                    if came is not None:
                        connection, process, said = came
                        if said != count or not 0 < process < count or process in present:
                            present[-1] = connection  # to be told as well
                            raise ValueError(_wrong(process, said, count, address))
                        present[process] = connection
                        selector.register(connection, selectors.EVENT_READ, process)
                else:  # it has said all it had to: it is gone, and perhaps comes again
                    selector.unregister(key.fileobj)
                    present.pop(key.data).close()


def _wrong(process: int, said: int, count: int, address: str) -> str:
    if said != count:
        return (
            f"process {process} was started as one of {said} and process 0 as one of {count}: "
            f"give all that meet at {address} the same number of processes"
        )
    return f"two processes at {address} are number {process} of {count}: number them from 0"


def _hello(server):
    """Returns (connection, number, count) of a process; None for anything else that connects."""
    connection, _ = server.accept()
    connection.settimeout(HELLO_SECONDS)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads(_line(connection))
        return connection, int(said["bltjax_process"]), int(said["of"])
    connection.close()
    return None


def _tell(present: dict, error: str):
    for connection in present.values():
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(dict(error=error)).encode() + b"\n")
        connection.close()


def _report(name: str, address: tuple, count: int, index: int, clock: _Clock):
    """Says the number of this process to process 0, again until that answers."""
    hello = json.dumps(dict(bltjax_process=index, of=count)).encode() + b"\n"
    why = "no answer"
    while clock.left() > 0:
        try:
            with socket.create_connection(address, timeout=max(clock.left(), 0.1)) as connection:
                connection.sendall(hello)
                error = _answer(connection, name, clock)
        except (OSError, ValueError, KeyError, TypeError) as failed:
            # Only what the system says is of use: an answer of something else is not.
            why = getattr(failed, "strerror", None) or NOT_OURS
            clock.waiting_for(f"process 0 at {name} ({why})")
            time.sleep(RETRY_SECONDS)
            continue
        if error:
            raise ValueError(error)
        return
    raise ValueError(
        f"process {index} of {count} found no process 0 at {name} within {clock.seconds:g} "
        f"seconds ({why}): check the address, and the log of process 0"
    )


def _answer(connection, name: str, clock: _Clock) -> str:
    """Returns what process 0 says is wrong, an empty text when all have come."""
    connection.settimeout(1.0)
    line = b""
    while not line.endswith(b"\n"):
        try:
            part = connection.recv(LINE_BYTES)
        except TimeoutError:
            clock.waiting_for(f"the other processes at {name}")
            if clock.left() < -2 * HELLO_SECONDS:  # process 0 names those that are missing
                raise
            continue
        if not part or len(line) > LINE_BYTES:
            raise ValueError(NOT_OURS)
        line += part
    return str(json.loads(line)["error"])


def _line(connection) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < LINE_BYTES:
        part = connection.recv(LINE_BYTES)
        if not part:
            break
        line += part
    return line


def _named(numbers: list[int], count: int) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' * (len(numbers) > 1)} {shown} of {count}"
