"""Processes that meet at an address, as threads: all of them, too few, strangers, wrong numbers."""

import json
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bltjax.runtime import roll_call
from tests.processes import free_port


def meet(port, calls, seconds=20.0):
    """What `answer` raised for each of (number, count), started in that order, or None."""

    def call(index, count):
        try:
            roll_call.answer("127.0.0.1", port, port, count, index, seconds)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(call, *zip(*calls, strict=True)))


def test_all_go_on_when_the_last_has_come():
    order = [(index, 9) for index in range(9)]
    random.shuffle(order)
    assert meet(free_port(), order) == [None] * 9, order


def test_the_address_is_free_again():
    port = free_port()
    for _ in range(3):
        assert meet(port, [(1, 2), (0, 2)]) == [None, None]


def test_those_who_are_missing_are_named_to_all():
    port = free_port()
    found = meet(port, [(0, 5), (2, 5)], seconds=1.0)
    assert found[0] == found[1]
    assert found[0].startswith(f"processes 1, 3, 4 of 5 did not come to 127.0.0.1:{port} within 1 ")


def test_nobody_at_the_address():
    port = free_port()
    (found,) = meet(port, [(1, 2)], seconds=0.5)
    assert found.startswith(f"process 1 of 2 found no process 0 at 127.0.0.1:{port} within 0.5 sec")
    assert "Connection refused" in found


def test_a_host_that_is_not_there():
    with pytest.raises(ValueError, match=r"at nowhere\.invalid:1234 within 0\.3 s"):
        roll_call.answer("nowhere.invalid", 1234, 1234, 2, 1, 0.3)


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (found,) = meet(port, [(0, 2)])
        assert found.startswith(f"process 0 cannot listen on port {port} (Address already in use)")
    with pytest.raises(ValueError, match="cannot listen on port 70000"):
        roll_call.answer("127.0.0.1", 70000, 70000, 2, 0, 1.0)


def test_somebody_else_at_the_address():
    """A server that knows nothing of this: it says nothing, or something else, or hangs up."""
    for answer in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff\n", b"[1]\n"):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve(server=server, answer=answer):
                while True:
                    try:
                        connection, _ = server.accept()
                    except OSError:
                        return
                    with connection:
                        connection.sendall(answer)

            threading.Thread(target=serve, daemon=True).start()
            (found,) = meet(server.getsockname()[1], [(1, 2)], seconds=0.5)
            assert found.startswith("process 1 of 2 found no process 0 at"), (answer, found)


@pytest.mark.parametrize(
    "calls, said",
    [
        ([(0, 2), (1, 3)], "process 1 was started as one of 3 and process 0 as one of 2"),
        ([(0, 3), (1, 3), (1, 3)], "two processes at .* are number 1 of 3"),
        ([(0, 2), (2, 3)], "process 2 was started as one of 3 and process 0 as one of 2"),
    ],
)
def test_processes_of_another_run_end_all(calls, said):
    found = meet(free_port(), calls, seconds=5.0)
    assert len(set(found)) == 1 and re.match(said, found[0] or ""), found


def test_strangers_and_those_who_left_do_not_count():
    port = free_port()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(meet, port, [(0, 2)])
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[]\n", b"x" * 9000):
            for _ in range(100):
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                        stranger.sendall(said)
                    break
                except OSError:
                    time.sleep(0.02)
        hello = json.dumps(dict(bltjax_process=1, of=2)).encode() + b"\n"
        with socket.create_connection(("127.0.0.1", port)) as left:
            left.sendall(hello)
            time.sleep(0.3)
            assert not first.done() or first.result() == [None]
        del left
        assert first.done() or meet(port, [(1, 2)]) == [None]
        assert first.result() == [None]
