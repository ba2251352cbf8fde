"""Leases, and files that appear as a whole, on a real server."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from bltjax.runtime import buckets, files, leases
from bltjax.runtime.files import OWNER, UNFINISHED, alone, new_directory, owning, replacing, share
from bltjax.runtime.paths import as_path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "STALE_SECONDS", 1.0)


def put_lease(path, **changes):
    there = dict(json.loads(leases._content("theirs")), host="elsewhere", machine="another", pid=7)
    return buckets.write(path, json.dumps(there | changes).encode())


def test_a_second_owner_is_refused_and_named(bucket):
    code = "\n".join(
        [
            "import sys, time",
            "from bltjax.runtime.files import owning",
            "from bltjax.runtime.paths import as_path",
            "with owning(as_path(sys.argv[1])): print('mine', flush=True); time.sleep(60)",
        ]
    )
    command = [sys.executable, "-c", code, os.fspath(bucket)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(BlockingIOError, match=rf"in use by process {other.pid} on "):
            owning(bucket).__enter__()
        other.kill()
    with owning(bucket):  # at once: it was of this machine and is gone
        assert leases.owner(bucket / OWNER)["pid"] == os.getpid()
    assert leases.owner(bucket / OWNER) == {}


def test_a_lease_of_another_machine_is_taken_over_once_it_stands_still(bucket, quick, capfd):
    put_lease(bucket / OWNER)
    began = time.monotonic()
    with owning(bucket):
        assert time.monotonic() - began >= 1.0
    assert "of process 7 on elsewhere" in capfd.readouterr().err


def test_a_lease_that_beats_is_not_taken_over(bucket, quick):
    ended = threading.Event()

    def beat():
        while not ended.wait(0.2):
            put_lease(bucket / OWNER)

    put_lease(bucket / OWNER)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(BlockingIOError, match="in use by process 7 on elsewhere"):
            owning(bucket).__enter__()
    finally:
        ended.set()
        thread.join()


def test_who_loses_a_lease_stops(bucket, quick, monkeypatch):
    lost = []
    monkeypatch.setattr(leases, "_lose", lost.append)
    with owning(bucket):
        put_lease(bucket / OWNER)
        deadline = time.monotonic() + 5
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
    assert lost and "was taken over by another process" in lost[0]


def test_who_has_lost_a_lease_learns_it_before_a_checkpoint(bucket, monkeypatch):
    lost = []
    monkeypatch.setattr(leases, "_lose", lost.append)
    with owning(bucket):
        leases.confirm()
        assert not lost
        put_lease(bucket / OWNER)
        leases.confirm()
        assert lost and "was taken over by another process" in lost[0]


def test_a_heartbeat_keeps_a_lease(bucket, quick):
    with owning(bucket):
        first = buckets.found(bucket / OWNER).generation
        time.sleep(0.5)
        assert buckets.found(bucket / OWNER).generation != first


def test_alone_is_alone(bucket):
    held, most = [], []

    def work():
        with alone(bucket):
            held.append(1)
            most.append(len(held))
            time.sleep(0.05)
            held.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_tasks_are_shared(bucket):
    done = []
    share(range(3), done.__contains__, done.append, lambda task: bucket / f"{task}.lock", 0.1)
    assert done == [0, 1, 2]
    assert buckets.below(bucket) == {}


def test_a_file_appears_as_a_whole(bucket):
    with pytest.raises(KeyError), replacing(bucket / "file") as file:
        file.write(b"half")
        raise KeyError
    assert buckets.below(bucket) == {}
    with replacing(bucket / "file") as file:
        file.write(b"whole")
    assert buckets.read(bucket / "file") == b"whole"


def test_a_new_directory_is_sent_when_it_is_filled(bucket, monkeypatch):
    with new_directory(bucket) as partial:
        (partial / "a" / "b").mkdir(parents=True)
        (partial / "a" / "b" / "c").write_text("text")
        assert buckets.below(bucket).keys() == {UNFINISHED}
    assert buckets.below(bucket).keys() == {"a/b/c"}
    with pytest.raises(FileExistsError, match="exists: choose another target"):
        new_directory(bucket).__enter__()
    buckets.write(bucket / UNFINISHED, leases._content("of a process that was killed"))
    monkeypatch.setattr(files.leases, "_held", set())
    with new_directory(bucket) as partial:
        (partial / "d").write_text("text")
    assert buckets.below(bucket).keys() == {"d"}


def test_a_bucket_that_is_not_there(server):
    with pytest.raises(OSError, match="no bucket gs://absent: check its name"):
        as_path("gs://absent/run")
    with pytest.raises(ValueError, match="names no bucket"):
        as_path("gs://")
    with pytest.raises(ValueError, match="only buckets of Google Cloud Storage will do"):
        as_path("s3://bucket/run")


def test_libraries_that_are_not_there(server, monkeypatch):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"pip install 'bltjax\[gcs\]'"):
        as_path("gs://another/run")


def test_a_moved_directory(bucket):
    buckets.write(bucket / "from" / "a" / "b", b"text")
    buckets.move_below(bucket / "from", bucket / "to")
    assert buckets.below(bucket).keys() == {"to/a/b"}
    assert buckets.entries(bucket) == ({}, ["to"])


@pytest.fixture
def answering(monkeypatch):
    """`answering(status)` has requests ask a server that answers all of them so; None: nobody."""
    running = []

    def begin(status):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_error(status)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        if status is not None:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        buckets._client.cache_clear()

    monkeypatch.setattr(buckets, "RETRY_SECONDS", 1)
    yield begin
    for server in running:
        server.server_close()
    buckets._client.cache_clear()


@pytest.mark.parametrize(
    "status, told",
    [
        (403, "may not be used by this account: give it the role Storage Object Admin"),
        (401, "needs credentials"),
        (503, "cannot be reached .*check the network, and run it again"),
        (None, "cannot be reached .*check the network, and run it again"),
    ],
)
def test_a_bucket_that_is_not_to_be_read(server, answering, status, told):
    answering(status)
    with pytest.raises(buckets.Unreachable, match=told) as caught:
        as_path(f"gs://of-{status}/run")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"gs://of-{status} ")


def test_no_credentials(server, answering, monkeypatch):
    from google.auth import exceptions
    from google.cloud import storage

    def client(**_):
        raise exceptions.DefaultCredentialsError("pages of text")

    answering(503)
    monkeypatch.setattr(storage, "Client", client)
    with pytest.raises(OSError, match="run `gcloud auth application-default login`"):
        as_path("gs://without-credentials/run")
