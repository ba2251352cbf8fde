"""Requests after the start compile nothing: JAX counts programs, in the server itself."""

import pytest

from tests.serving import servers

# Programs of the server are never done until the file named by FLAG is there.
SLOW = """
import os, time
from bltjax import cli
from bltjax.commands import serve
from bltjax.inference.scheduler import Scheduler
def there():
    time.sleep(0.02)
    return os.path.exists(os.environ["FLAG"])
Scheduler.warm_up = lambda self, jobs: iter(there, True)
cli.run(serve.main, serve.define_flags)
"""
NO_ROOM = """
from bltjax import cli
from bltjax.commands import serve
from bltjax.inference.scheduler import Scheduler
def warm_up(self, jobs):
    yield 64
    raise ValueError("9.9 GiB are needed, and 1.0 GiB are free")
Scheduler.warm_up = warm_up
cli.run(serve.main, serve.define_flags)
"""
USUAL = [
    dict(prompt="the", temperature=0),
    dict(prompt="the"),
    dict(prompt="the", temperature=0.7, top_p=0.9, top_k=40, stop=["\n", "a longer one"]),
    dict(prompt=[101, 102], temperature=0.3, min_p=0.1, n=2, seed=1),
    dict(prompt=["one", "two"], temperature=0),  # both at once, into a room without others
    dict(prompt="x" * 40, stream=True),
]
MESSAGES = [dict(role="developer", content="be"), dict(role="user", content="hi")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return servers.write_model(tmp_path_factory.mktemp("warm") / "tiny", bltjax_chat=servers.CHAT)


def is_ok(server):
    return server.get("/health").status_code == 200


def test_usual_requests_compile_nothing(checkpoint):
    arguments = "--max_length=64", "--rows=2", "--warm_up"
    with servers.running(checkpoint, *arguments) as server:
        server.wait_for(lambda: is_ok(server))
        before = server.metric("bltjax_compilations_total")
        assert before > 10 and server.metric("bltjax_steps_total") == 0
        for body in USUAL:
            found = server.post("/v1/completions", dict(max_tokens=4) | body)
            assert found.status_code == 200, found.text
            assert server.metric("bltjax_compilations_total") == before, body
        for _ in range(2):
            body = dict(messages=MESSAGES, max_tokens=4)
            assert server.post("/v1/chat/completions", body).status_code == 200
            assert server.metric("bltjax_compilations_total") == before
        code, _, err = server.end()
    assert code == 0 and "\nready after " in err


def test_requests_go_before_what_is_not_compiled_yet(checkpoint, tmp_path):
    flag = tmp_path / "flag"
    arguments = "--max_length=64", "--rows=2", "--warm_up"
    with servers.running(checkpoint, *arguments, code=SLOW, FLAG=str(flag)) as server:
        told = server.get("/health")
        assert told.status_code == 503 and told.json()["error"]["code"] == "warming_up"
        assert told.headers["retry-after"] == "1"
        found = server.post("/v1/completions", dict(prompt="a", max_tokens=2, temperature=0))
        assert found.status_code == 200
        assert server.get("/health").status_code == 503
        flag.touch()
        server.wait_for(lambda: is_ok(server))


def test_rooms_without_memory_are_told_and_small_ones_serve(checkpoint):
    arguments = "--max_length=64", "--rows=2", "--warm_up"
    with servers.running(checkpoint, *arguments, code=NO_ROOM) as server:
        server.wait_for(lambda: is_ok(server))
        body = dict(prompt="a", max_tokens=2, temperature=0)
        assert server.post("/v1/completions", body).status_code == 200
        err = server.end()[2]
    assert "note: long texts will be refused, lower --max_length or --rows: 9.9 GiB" in err
