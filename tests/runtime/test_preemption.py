"""Announcements of a metadata server, a real one of HTTP, to real processes."""

import contextlib
import os
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from bltjax.runtime import preemption
from bltjax.runtime.signals import STOPPED
from tests import processes
from tests.launching import wait_for
from tests.processes import ROOT, ended, free_port, metrics, wait_for_step

QUIET = {"preempted": "FALSE", "maintenance-event": "NONE"}
STEPS = 400


class Metadata(BaseHTTPRequestHandler):
    """Answers as Google's server does, and waits where it is asked to."""

    server: "Server"

    def do_GET(self):
        url = urlsplit(self.path)
        directory, _, key = url.path.rpartition("/")
        right = directory == "/computeMetadata/v1/instance" and key in QUIET
        if self.headers["Metadata-Flavor"] != "Google" or not right:
            return self.send_error(403 if right else 404)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        server = self.server
        with server.changed:
            server.asked.append((key, "last_etag" in query))
            server.changed.notify_all()
            if query.get("wait_for_change") == "true" and server.holds_back:
                differs = lambda: server.etag(key) != query["last_etag"]  # noqa: E731
                server.changed.wait_for(differs, float(query["timeout_sec"]))
            value, etag = server.values[key], server.etag(key)
        self.send_response(200)
        if server.flavor:
            self.send_header("Metadata-Flavor", server.flavor)
        self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(value.encode())

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, flavor="Google", holds_back=True):
        super().__init__(("127.0.0.1", 0), Metadata)
        self.flavor, self.holds_back = flavor, holds_back
        self.values, self.changed, self.asked = dict(QUIET), threading.Condition(), []

    def etag(self, key):
        return f"{hash(self.values[key]) % 2**32:x}"

    def set(self, key, value):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def wait_for(self, *asked):
        """Until a request (key, whether it waits for a change) has come."""
        with self.changed:
            assert self.changed.wait_for(lambda: set(asked) <= {*self.asked}, 120), self.asked


@contextlib.contextmanager
def serving(server):
    """HOST:PORT of a server that runs in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def train(workdir, hosts):
    """Processes of one run; each has the metadata server that is named for it."""
    flags = [
        "--config=tests/configs/tiny.py",
        f"--workdir={workdir}",
        "--config.data.root=synthetic://",
        "--config.data.max_bytes=60000",
        "--config.stages=('entropy_model',)",
        f"--config.entropy_training.steps={STEPS}",
        "--config.entropy_training.checkpoint_every=1000",
    ]
    if len(hosts) > 1:
        flags += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={len(hosts)}"]
    return [
        processes.start(
            "bltjax.train",
            *flags,
            *([f"--process_id={i}"] if len(hosts) > 1 else []),
            env=processes.environment() | {preemption.HOST: host},
        )
        for i, host in enumerate(hosts)
    ]


@pytest.mark.long
@pytest.mark.parametrize("key, count", [("preempted", 1), ("maintenance-event", 2)])
def test_a_run_saves_before_a_machine_is_taken_away_and_goes_on(tmp_path, key, count):
    absent = f"127.0.0.1:{free_port()}"
    with Server() as server, serving(server) as host:
        hosts = [*[absent] * (count - 1), host]  # the others of its run are told by it
        run = train(tmp_path, hosts)
        server.wait_for(*((key, True) for key in QUIET))
        wait_for_step(run, tmp_path, "entropy_model", 3)
        server.set(key, preemption.ENDS[key])
        outputs = ended(run)
        assert [code for code, _, _ in outputs] == [STOPPED] * count, outputs
        assert f"taken away ({key}={preemption.ENDS[key]}): stopping" in outputs[-1][2]
        told = [err.splitlines()[-1] for _, _, err in outputs]
        (step,) = {line.partition("step ")[2].partition(" ")[0] for line in told}
        assert all(f"entropy_model: stopped as asked, step {step} of {STEPS}" in s for s in told)

        outputs = ended(train(tmp_path, hosts))  # on the machine that is announced to end
        assert [code for code, _, _ in outputs] == [0] * count, outputs
        assert f"resumed at step {step} of {STEPS}" in outputs[0][1]
        assert "as was known before the start: going on" in outputs[-1][2]
        steps = [line["step"] for line in metrics(tmp_path, "entropy_model")]
        assert steps == list(range(STEPS))


WATCHER = """
import os, sys
from bltjax.runtime import preemption, signals
preemption.RETRY_SECONDS = 0.1
with signals.leaving(lambda number: os._exit(75)):
    preemption.watch(os.environ)
    sys.stdin.read()
print("done")
"""


def watcher(**environ):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.Popen([sys.executable, "-c", WATCHER], env=env, text=True, **pipes)


def is_undisturbed(process):
    out, err = process.communicate("", timeout=60)
    return (process.returncode, out, err) == (0, "done\n", "")


class Broken(socketserver.ThreadingTCPServer):
    """Counts connections and answers each of them with the same bytes, or never."""

    daemon_threads = True

    def __init__(self, answer):
        self.answer, self.came = answer, threading.Semaphore(0)
        super().__init__(("127.0.0.1", 0), None)

    def finish_request(self, request, client_address):
        request.recv(1000)
        self.came.release()
        if self.answer is None:
            request.recv(1)  # until the other closes
        with contextlib.suppress(OSError):
            request.sendall(self.answer or b"")


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"",
        b"\x00\xff\x1f\n" * 1000,
        b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\n\r\n\xff\xfe",
        b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nETag: \r\n\r\nTRUE and more",
        b"HTTP/1.1 503 Busy\r\nMetadata-Flavor: Google\r\n\r\nTRUE",
    ],
    ids=["hangs", "closes", "garbage", "no text", "another value", "error"],
)
def test_a_broken_server_changes_nothing(answer):
    with Broken(answer) as server, serving(server) as host:
        process = watcher(**{preemption.HOST: host})
        for _ in range(2 if answer is None else 6):
            assert server.came.acquire(timeout=60)
        assert is_undisturbed(process)


def test_no_server_changes_nothing():
    assert is_undisturbed(watcher(**{preemption.HOST: f"127.0.0.1:{free_port()}"}))
    assert is_undisturbed(watcher(**{preemption.HOST: "no such:host"}))


def test_a_server_of_others_is_not_believed():
    with Server(flavor="Other") as server, serving(server) as host:
        process = watcher(**{preemption.HOST: host})
        server.wait_for(("preempted", False))
        server.set("preempted", "TRUE")
        time.sleep(0.5)
        assert is_undisturbed(process)
        assert not any(waits for _, waits in server.asked)


def test_only_the_end_of_the_machine_stops_a_run():
    with Server() as server, serving(server) as host:
        process = watcher(**{preemption.HOST: host})
        server.wait_for(*((key, True) for key in QUIET))
        server.asked.clear()
        server.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        server.wait_for(("maintenance-event", True))
        server.asked.clear()
        server.set("maintenance-event", "NONE")
        server.wait_for(("maintenance-event", True))
        assert process.poll() is None
        server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        assert process.wait(timeout=60) == STOPPED
        process.communicate()


def test_a_server_that_does_not_hold_back_is_not_asked_all_the_time():
    with Server(holds_back=False) as server, serving(server) as host:
        process = watcher(**{preemption.HOST: host})
        server.wait_for(*((key, True) for key in QUIET))
        time.sleep(1.5)
        assert len(server.asked) < 12
        assert is_undisturbed(process)


def test_where_no_server_is_named_none_is_looked_for(tmp_path, monkeypatch):
    product, started = tmp_path / "product_name", []
    monkeypatch.setattr(preemption, "PRODUCT", product)
    monkeypatch.setattr(preemption, "_watch", lambda host, key: started.append((host, key)))
    preemption.watch({})
    product.write_text("Laptop\n")
    preemption.watch({})
    product.write_text("Google Compute Engine\n")
    preemption.watch({preemption.NO_CHECK: "true"})
    assert not started
    preemption.watch({})
    wait_for(lambda: len(started) == 2)
    assert sorted(started) == sorted((preemption.USUAL_HOST, key) for key in QUIET)
