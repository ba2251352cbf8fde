"""What clients of OpenAI's protocol send beside the fields that mean something here."""

import socket

import openai
import pytest

from bltjax.commands import serve
from tests.serving import servers

ORIGIN = "https://app.example"
KEY = {"Authorization": "bearer a secret"}
LITELLM = dict(
    user="someone",
    metadata=dict(trace="1"),
    service_tier="auto",
    store=False,
    logit_bias=None,
    response_format=dict(type="text"),
    frequency_penalty=0.0,
    presence_penalty=0,
    tools=None,
    tool_choice="none",
    parallel_tool_calls=True,
    reasoning_effort="low",
    stop=None,
    top_p=1,
    top_k=-1,
    n=None,
    stream_options=None,
)
MESSAGES = [dict(role="developer", content="be"), dict(role="user", content="hi", name="Ada")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return servers.write_model(tmp_path_factory.mktemp("asked") / "tiny", bltjax_chat=servers.CHAT)


@pytest.fixture(scope="module")
def server(checkpoint):
    with servers.running(checkpoint, "--max_length=64", "--rows=2") as found:
        yield found


@pytest.fixture(scope="module")
def behind(checkpoint):
    """A server behind a proxy, asked by pages of another site, at an address of IPv6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    arguments = "--host=::1", f"--cors={ORIGIN}", "--root_path=blt/", "--api_key=a secret"
    with servers.running(checkpoint, *arguments) as found:
        yield found


@pytest.mark.parametrize(
    "more",
    [
        {},
        LITELLM,
        dict(prompt=""),
        dict(prompt=None),
        dict(prompt=[104, 105]),
        dict(prompt=["hi", "ho"]),
        dict(stop=[], logprobs=None),
        dict(top_k=0, min_p=0),
        dict(max_completion_tokens=9, max_tokens=None),
    ],
)
def test_completions_of_any_client(server, more):
    body = dict(model="any", prompt="hi", max_tokens=2, temperature=0) | more
    found = server.post("/v1/completions", body)
    assert found.status_code == 200, found.text
    most = 2 if body["max_tokens"] else 16
    assert all(len(choice["text"]) <= most for choice in found.json()["choices"])


def test_several_texts_of_one_prompt_are_streamed(server):
    options = dict(model="m", prompt="hi", max_tokens=2, temperature=0, n=2)
    usage = dict(stream_options=dict(include_usage=True))
    pieces = list(server.client().completions.create(stream=True, **options, **usage))
    whole = server.client().completions.create(**options)
    grown = ["", ""]
    for piece in pieces[:-1]:
        grown[piece.choices[0].index] += piece.choices[0].text
    assert grown == [choice.text for choice in whole.choices]
    assert pieces[-1].usage == whole.usage


def test_chats_of_any_client(server):
    body = LITELLM | dict(messages=MESSAGES, max_completion_tokens=2, temperature=0)
    found = server.post("/v1/chat/completions", body)
    assert found.status_code == 200, found.text
    named = dict(messages=[dict(MESSAGES[0], role="system"), MESSAGES[1]])
    again = server.post("/v1/chat/completions", body | named)
    assert found.json()["choices"] == again.json()["choices"]


def test_the_model_by_its_name(server):
    assert server.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here: there is tiny"):
        server.client().models.retrieve("other")


def test_heads_and_other_methods(server):
    for path in ("/health", "/", "/v1/models"):
        found = server.ask("HEAD", path)
        assert found.status_code == 200 and not found.content
    found = server.ask("OPTIONS", "/v1/completions", headers=preflight(ORIGIN))
    assert found.status_code == 405 and "access-control-allow-origin" not in found.headers
    assert "POST" in found.headers["allow"] and "error" in found.json()


def preflight(origin):
    """Headers with which a browser asks before it sends a page's request."""
    wanted = "authorization,content-type,x-stainless-os"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
    return asked | {"Origin": origin}


def test_pages_of_sites_that_are_named_may_ask(behind):
    """Without the key, which a browser does not send before it knows that it may."""
    allowed = behind.ask("OPTIONS", "/v1/completions", headers=preflight(ORIGIN))
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    other = behind.ask("OPTIONS", "/v1/completions", headers=preflight("https://other.example"))
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
    for headers, status in ((KEY, 200), ({}, 401)):  # a page can read why
        found = behind.post("/tokenize", dict(prompt="a"), headers=headers | {"Origin": ORIGIN})
        assert found.status_code == status
        assert found.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize("prefix", ["", "/blt"])
def test_a_proxy_takes_its_prefix_off_or_leaves_it(behind, prefix):
    assert behind.get(f"{prefix}/").text.startswith("<!doctype html>")
    assert behind.get(f"{prefix}/health").status_code == 200
    assert behind.get(f"{prefix}/v1/models").status_code == 401
    assert behind.get(f"{prefix}/v1/models/tiny", headers=KEY).json()["id"] == "tiny"
    described = behind.get(f"{prefix}/openapi.json", headers=KEY).json()
    assert described["servers"] == [{"url": "/blt"}]
    counted = behind.get("/metrics", headers=KEY).text
    assert 'path="/health",status="200"' in counted and "/blt" not in counted


def test_the_page_below_a_prefix_ends_in_a_slash(behind):
    """Else its own requests would go beside the prefix."""
    found = behind.get("/blt")
    assert found.status_code == 307 and found.headers["location"].endswith("/blt/")


def test_what_is_no_origin_is_told():
    assert serve.origins([ORIGIN, "http://localhost:3000", "*"])[1] == "http://localhost:3000"
    for origin in ("app.example", "https://app.example/", "https://a.b/c", ""):
        with pytest.raises(ValueError, match=f"--cors={origin}: give origins as https://"):
            serve.origins([origin])
