"""Clients that go, servers that are told to end, models that fail: real processes, real signals."""

import concurrent.futures
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving import servers

LONG = dict(model="m", prompt="the", max_tokens=4000, temperature=0)
SMALL_ROOMS = "--rows=2", "--max_length=4096"
KEY = "a secret"
# Fails in the third step, as a device may.
FAILING = """
import sys
from bltjax import cli
from bltjax.inference.scheduler import Scheduler
from bltjax.commands import serve
def step(self, steps=[], before=Scheduler.step):
    steps.append(1)
    if len(steps) == 3:
        raise RuntimeError("the device is lost")
    return before(self)
Scheduler.step = step
cli.run(serve.main, serve.define_flags)
"""

# Reads a stream.
CLIENT = """
import sys, urllib.request
url, key, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
request = urllib.request.Request(url + "/v1/completions", body.encode(), headers)
for line in urllib.request.urlopen(request):
    print(line, flush=True)
"""
ROUNDS = 9  # of 64 clients


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return servers.write_model(tmp_path_factory.mktemp("faults") / "tiny")


@pytest.fixture(scope="module")
def server(checkpoint):
    with servers.running(checkpoint, *SMALL_ROOMS, "--max_waiting=0", BLTJAX_API_KEY=KEY) as found:
        found.headers = {"Authorization": f"Bearer {KEY}"}
        yield found


def is_idle(server):
    lines = server.get("/metrics", headers=server.headers).text.splitlines()
    return {"bltjax_running 0.0", "bltjax_waiting 0.0"} <= set(lines)


def written(server):
    """Bytes that the server has written so far."""
    text = server.get("/metrics", headers=server.headers).text
    return float(re.search(r"^bltjax_new_bytes_total (\S+)$", text, re.MULTILINE)[1])


def test_the_key_is_asked_for(server):
    assert server.get("/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Bearer {KEY}x"}):
        found = server.post("/v1/completions", {}, headers=headers)
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="other").models.list()
    assert server.client(api_key=KEY).models.list().data[0].id == "tiny"


def test_a_client_that_goes_frees_its_row(server):
    """While it waits for the whole text, and in the middle of a stream."""
    for stream in (False, True):
        body = dict(LONG, stream=stream)
        address = server.url.removeprefix("http://").split(":")
        client = socket.create_connection((address[0], int(address[1])))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        head += f"Content-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n\r\n"
        client.sendall(head.encode() + data)
        server.wait_for(lambda: not is_idle(server))
        if stream:
            assert client.recv(8)
        client.close()
        server.wait_for(lambda: is_idle(server))
        assert written(server) < 3000  # of 4000 in each
    found = server.get("/metrics", headers=server.headers).text
    assert 'bltjax_requests_total{path="/v1/completions",status="499"}' in found


def test_a_client_that_is_killed_frees_its_row(server):
    command = [sys.executable, "-c", CLIENT, server.url, KEY, json.dumps(dict(LONG, stream=True))]
    client = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert client.stdout.read(1)  # it has got something
    client.kill()
    client.communicate()
    at_kill = written(server)
    server.wait_for(lambda: is_idle(server))
    assert written(server) - at_kill < 500  # of 4000; a round writes 16


def test_more_than_the_queue_holds_is_refused_and_comes_later(server):
    client = server.client(api_key=KEY)
    streams = [client.completions.create(stream=True, **LONG) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model="m", prompt="x", max_tokens=1)
    assert refused.value.response.headers["retry-after"] == "1"
    assert refused.value.code == "queue_full"
    for stream in streams:
        stream.close()
    patient = server.client(api_key=KEY, max_retries=8)
    assert patient.completions.create(model="m", prompt="x", max_tokens=1).usage is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
SMALL = dict(prompt=st.text(max_size=6) | st.lists(st.integers(-1, 257), max_size=4) | JSON)
SMALL |= dict(temperature=st.floats(-1, 3) | JSON)
SMALL |= dict(stop=st.text(max_size=3) | JSON, n=st.integers(0, 2) | JSON, seed=JSON)
SMALL |= dict(logprobs=st.integers(0, 6) | st.booleans() | JSON, echo=st.booleans() | JSON)
SMALL |= dict(stream=st.booleans() | JSON, stream_options=JSON, messages=JSON, tokens=JSON)
SMALL |= dict(threshold=JSON, top_logprobs=JSON, logit_bias=JSON, best_of=JSON, model=JSON)
BODIES = JSON | st.fixed_dictionaries(dict(max_tokens=st.integers(-1, 3) | JSON), optional=SMALL)
PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/patches", "/tokenize", "/detokenize"]


@pytest.mark.long
@settings(max_examples=150)
@given(path=st.sampled_from(PATHS), body=BODIES)
def test_no_request_makes_the_server_fail(server, path, body):
    content = json.dumps(body)
    headers = {**server.headers, "Content-Type": "application/json"}
    found = server.post(path, content=content, headers=headers)
    assert found.status_code in (200, 400), (found.status_code, content)
    if found.status_code == 400:
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_sigterm_lets_running_answers_finish(checkpoint):
    body = dict(LONG, max_tokens=600)
    with servers.running(checkpoint, *SMALL_ROOMS) as server:
        stream = server.client().completions.create(stream=True, **body)
        pieces = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.get("/health").status_code == 503)
        refused = server.post("/v1/completions", body)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        pieces += stream
        assert pieces[-1].choices[0].finish_reason in ("length", "stop")
        code, lines, err = server.ended()
    assert code == 0 and json.loads(lines[-1])["new_bytes"] > 1, err
    assert err.splitlines()[-1].startswith("ending: running answers are finished first")


def test_a_second_signal_ends_at_once(checkpoint):
    with servers.running(checkpoint, *SMALL_ROOMS) as server:
        stream = server.client().completions.create(stream=True, **LONG)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.get("/health").status_code == 503)
        code, _, err = server.end(signal.SIGTERM)
        assert code == 128 + signal.SIGTERM and err.splitlines()[-1] == "stopped by SIGTERM"
        with pytest.raises((httpx.HTTPError, openai.APIError)):
            list(stream)


def test_a_model_that_fails_ends_the_server(checkpoint):
    with servers.running(checkpoint, *SMALL_ROOMS, code=FAILING) as server:
        failed = server.post("/v1/completions", LONG)
        assert failed.status_code == 500
        assert "the model has failed and this server ends" in failed.json()["error"]["message"]
        code, _, err = server.ended()
    assert code == 1
    assert "error: the model failed: RuntimeError('the device is lost')" in err


def test_an_address_that_is_taken_is_told_before_the_model_is_read(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = servers.start(checkpoint, f"--port={port}")
        _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith(f"error: cannot listen at 127.0.0.1:{port} (")


def resident_bytes(process) -> int:
    """Memory that a process holds now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (found,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found)


@pytest.mark.slow
def test_sixty_four_clients_a_third_of_whom_go(checkpoint):
    """Each gets the text that it would get alone; memory does not grow, nothing taken is lost."""
    with servers.running(checkpoint, *SMALL_ROOMS) as server:
        client = server.client()

        def ask(number, length=12, stays=True):
            options = dict(model="m", prompt=f"client {number % 16}", max_tokens=length)
            if stays:
                return client.completions.create(temperature=0, **options).choices[0].text
            with client.completions.create(temperature=0, stream=True, **options) as stream:
                next(stream)

        alone, held = [ask(number) for number in range(16)], []
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            for _ in range(ROUNDS):
                stays = [number % 3 < 2 for number in range(64)]
                together = list(pool.map(ask, range(64), [12] * 64, stays))
                for number, text in enumerate(together):
                    assert text == (alone[number % 16] if stays[number] else None)
                held.append(resident_bytes(server.process))
            server.wait_for(lambda: server.metric("bltjax_running") == 0)
            assert held[-1] < 1.02 * held[ROUNDS // 3], held
            long = [ask(number, 200) for number in range(2)]
            before = server.metric("bltjax_prompt_bytes_total")
            asked = [pool.submit(ask, number % 2, 200) for number in range(24)]
            read = before + 24 * len("client 0")
            server.wait_for(lambda: server.metric("bltjax_prompt_bytes_total") == read)
            server.process.send_signal(signal.SIGTERM)
            assert not all(one.done() for one in asked)
            assert [one.result() for one in asked] == long * 12
        assert server.ended()[0] == 0
