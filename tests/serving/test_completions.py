"""OpenAI's own client against a real server: texts are those that the model writes."""

import json
import math

import numpy as np
import openai
import pytest

import bltjax
from tests.serving import servers

PROMPTS = ["in a café on", "日本", "", "the"]
HALF = list("日".encode())[:2]  # half a character, as only integers can have it
GREEDY = dict(model="any", temperature=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return servers.write_model(tmp_path_factory.mktemp("served") / "tiny", bltjax_chat=servers.CHAT)


@pytest.fixture(scope="module")
def model(checkpoint):
    return bltjax.load(checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint):
    with servers.running(checkpoint, "--max_length=1024", "--rows=4") as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def texts(model):
    """Bytes that the model goes on with after each prompt, and after half a character."""
    return model.generate([*PROMPTS, bytes(HALF)], max_new_bytes=24)


def shown(data):
    return data.decode("utf-8", "replace")


def finish_of(data, limit=24):
    return "length" if len(data) == limit else "stop"


def test_many_prompts_give_the_texts_of_the_model(client, texts):
    found = client.completions.create(prompt=PROMPTS, max_tokens=24, **GREEDY)
    assert [choice.text for choice in found.choices] == [shown(text) for text in texts[:-1]]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [c.finish_reason for c in found.choices] == [finish_of(text) for text in texts[:-1]]
    usage, read = found.usage, sum(len(prompt.encode()) for prompt in PROMPTS)
    assert usage.prompt_tokens == read
    assert usage.completion_tokens == sum(map(len, texts[:-1]))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.patches > 4 and usage.global_calls > 0
    assert found.object == "text_completion" and found.id.startswith("cmpl-")


def test_pieces_add_up_and_usage_comes_last(client, texts):
    options = dict(prompt=PROMPTS, max_tokens=24, stream=True, **GREEDY)
    pieces = list(client.completions.create(stream_options={"include_usage": True}, **options))
    grown, ends = [""] * 4, [None] * 4
    for piece in pieces[:-1]:
        (choice,) = piece.choices
        assert ends[choice.index] is None and piece.usage is None
        grown[choice.index] += choice.text
        ends[choice.index] = choice.finish_reason
    assert grown == [shown(text) for text in texts[:-1]]
    assert ends == [finish_of(text) for text in texts[:-1]]
    assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens > 0
    assert len({piece.id for piece in pieces}) == 1
    assert all(piece.usage is None for piece in client.completions.create(**options))


def test_a_prompt_may_end_inside_a_character(client, texts):
    alone = client.completions.create(prompt=HALF, max_tokens=24, **GREEDY)
    assert alone.choices[0].text == shown(texts[-1])  # nothing of the prompt
    assert alone.usage.prompt_tokens == 2
    both = client.completions.create(prompt=[HALF, HALF], max_tokens=24, echo=True, **GREEDY)
    assert {choice.text for choice in both.choices} == {shown(bytes(HALF) + texts[-1])}


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_of_several_bytes_end_the_text_and_are_not_shown(client, model, stream):
    text = model.generate(["the"], max_new_bytes=24, valid_utf8=True)[0]
    for length in (2, 5):
        stop = shown(text)[3 : 3 + length]
        options = dict(prompt="the", max_tokens=24, stop=[stop, "never"], **GREEDY)
        found = client.completions.create(
            stream=stream, extra_body=dict(valid_utf8=True), **options
        )
        choices = [piece.choices[0] for piece in (found if stream else [found])]
        assert "".join(choice.text for choice in choices) == shown(text).split(stop)[0]
        assert choices[-1].finish_reason == "stop"


def test_a_seed_gives_the_same_text_in_any_company(client):
    options = dict(model="m", prompt="the", max_tokens=12, temperature=1, top_p=0.9)
    both = client.completions.create(n=2, seed=7, **options).choices
    (second,) = client.completions.create(seed=8, **options).choices
    again = client.completions.create(n=2, seed=7, **options).choices
    assert both[0].text != both[1].text == second.text
    assert [choice.text for choice in again] == [choice.text for choice in both]
    unseeded = {client.completions.create(**options).choices[0].text for _ in range(2)}
    assert len(unseeded) == 2


def test_a_threshold_is_that_of_the_request(client, model):
    (text,) = model.generate(["in a caf"], max_new_bytes=24, threshold=0.1)
    options = dict(prompt="in a caf", max_tokens=24, **GREEDY)
    found = client.completions.create(extra_body=dict(threshold=0.1), **options)
    assert found.choices[0].text == shown(text)
    assert found.usage.patches > client.completions.create(**options).usage.patches


def test_log_probs_of_a_prompt_are_those_of_the_scorer(client, model):
    data = "in a café".encode()
    (log_p,) = model.log_probs([data])
    options = dict(prompt="in a café", echo=True, logprobs=5, **GREEDY)
    for limit in (0, 1, 3):
        found = client.completions.create(max_tokens=limit, **options).choices[0]
        told = found.logprobs
        ids = np.frombuffer(data, np.uint8).astype(int) + 4
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        exact = [float(row[i]) for row, i in zip(log_p, ids, strict=False)]
        assert told.token_logprobs[1 : len(data)] == pytest.approx(exact[1:], abs=1e-6)
        assert told.bytes[: len(data)] == list(data)
        assert told.text_offset[: len(data)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
        assert found.text.startswith("in a café") and len(told.tokens) == len(told.bytes)
        best = told.top_logprobs[len(data) - 1]
        assert len(best) in (5, 6) and max(best.values()) == next(iter(best.values()))
        assert best[told.tokens[len(data) - 1]] == told.token_logprobs[len(data) - 1]


def test_log_probs_of_new_bytes_are_those_before_sampling(client, model):
    """Whatever is drawn: the model's own, over all ids."""
    options = dict(model="m", prompt="the", max_tokens=8, logprobs=2, seed=3, temperature=1.5)
    for stream in (False, True):
        found = client.completions.create(stream=stream, extra_body=dict(top_k=50), **options)
        parts = [piece.choices[0].logprobs for piece in (found if stream else [found])]
        data = bytes(byte for part in parts if part for byte in part.bytes)
        told = [p for part in parts if part for p in part.token_logprobs]
        (log_p,) = model.log_probs([b"the" + data])
        exact = [float(log_p[3 + i, byte + 4]) for i, byte in enumerate(data)]
        assert len(data) == 8 and told == pytest.approx(exact, abs=1e-4)


def test_a_one_byte_answer_has_an_entry_also_where_it_is_the_end(client):
    """lm-evaluation-harness leaves out the last one, whatever it is."""
    for prompt in ([256, *b"ab"], "ab", [256]):
        found = client.completions.create(
            prompt=prompt, max_tokens=1, echo=True, logprobs=1, **GREEDY
        )
        told = found.choices[0].logprobs
        assert len(told.tokens) == len(prompt) + 1
        assert (told.tokens[0] == "<|bos|>") == (prompt != "ab")
    assert told.token_logprobs[0] is None and told.bytes[0] is None


def test_a_chat_gives_the_answer_of_the_model(client, model):
    messages = [dict(role="system", content="be brief"), dict(role="user", content="naïve 🎈?")]
    answer = model.chat(messages, max_new_bytes=16)
    found = client.chat.completions.create(messages=messages, max_completion_tokens=16, **GREEDY)
    assert found.choices[0].message.content == answer
    assert found.choices[0].message.role == "assistant" and found.object == "chat.completion"
    pieces = list(
        client.chat.completions.create(messages=messages, max_tokens=16, stream=True, **GREEDY)
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == answer
    ends = [piece.choices[0].finish_reason for piece in pieces]
    assert ends[-1] == found.choices[0].finish_reason and set(ends[:-1]) == {None}


def test_log_probs_of_a_chat(client):
    found = client.chat.completions.create(
        messages=[dict(role="user", content="x")],
        max_completion_tokens=6,
        logprobs=True,
        top_logprobs=20,
        **GREEDY,
    )
    content = found.choices[0].logprobs.content
    data = bytes(byte for entry in content for byte in entry.bytes)
    assert shown(data) == found.choices[0].message.content and len(data) > 0
    for entry in content:
        assert len(entry.top_logprobs) == 20
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-5


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        (dict(prompt="a", temperature=-1), "temperature", "temperature=-1 must be"),
        (dict(prompt="a", best_of=2), "best_of", "best_of=2 must be n=1"),
        (dict(prompt="a", logit_bias={"65": 1}), "logit_bias", "not supported"),
        (dict(prompt=[1, 256]), "prompt", "holds 256 after its beginning"),
        (dict(prompt="a", max_tokens=2**20), None, "needs 1048578 positions, and there are 1024"),
        (
            dict(prompt="a", max_tokens=2**20, stream=True),
            None,
            "needs 1048578 positions, and there are 1024",
        ),
        (dict(prompt="a" * 9000, echo=True, logprobs=0), "prompt", "9000 bytes"),
        (
            dict(prompt="a", echo=True, logprobs=1, extra_body=dict(threshold=1)),
            "threshold",
            "scored with the trained one",
        ),
        (dict(prompt=["a"] * 69), None, "69 texts are asked for at once"),
    ],
)
def test_what_cannot_be_had_is_refused_in_openais_form(client, body, param, told):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="m", **body)
    assert told in refused.value.message and refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_conversations_that_are_none_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="it must be one of"):
        client.chat.completions.create(model="m", messages=[dict(role="tool", content="x")])
    with pytest.raises(openai.BadRequestError, match="no text as its content"):
        client.chat.completions.create(model="m", messages=[dict(role="user", content=[1])])


def test_other_routes(server, client, model):
    assert client.models.list().data[0].id == "tiny"
    assert server.get("/health").json() == {"status": "ok"}
    assert server.post("/tokenize", dict(prompt="é")).json()["tokens"] == [0xC3, 0xA9]
    assert server.post("/detokenize", dict(tokens=[0xC3, 0xA9])).json() == {"prompt": "é"}
    assert server.get("/nothing").json()["error"]["message"].startswith("no /nothing here")
    assert server.get("/v1/completions").status_code == 405
    assert json.loads(server.get("/openapi.json").text)["openapi"] == "3.1.0"
    page = server.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<textarea" in page.text and "//" not in page.text  # nothing of other sites
    found = server.post("/v1/patches", dict(prompt="in a café", threshold=0.5)).json()
    ends = [patch["start"] + patch["length"] for patch in found["patches"]]
    assert ends[-1] == 10 and found["patches"][0]["start"] == 0
    assert [patch["start"] for patch in found["patches"][1:]] == ends[:-1]
    tokens = bltjax.vocabulary.encode("in a café")[None]
    assert found["entropies"] == pytest.approx(model.entropies(tokens)[0, :-2].tolist(), rel=1e-4)
    assert found["threshold"] == 0.5 and found["num_bytes"] == 10


@pytest.mark.parametrize(
    ("content", "kind", "status", "told"),
    [
        (b"{}", "text/plain", 415, "Content-Type: application/json"),
        (b"{", "application/json", 400, "no JSON"),
        (b'{"temperature": NaN}', "application/json", 400, "it holds NaN"),
        (b"[" * 100_000, "application/json", 400, "no JSON"),
        (b"\xff\xfe\x00", "application/json", 400, "no JSON"),
        (b'{"prompt": "' + b"a" * 2**22 + b'"}', "application/json", 413, "more than 4194304"),
        (b'{"max_tokens": 1' + b"0" * 5000 + b"}", "application/json", 400, "no JSON"),
        (b'{"stop": "\\ud800", "max_tokens": 1}', "application/json", 200, ""),
    ],
)
def test_bodies_that_are_no_request(server, content, kind, status, told):
    headers = {"Content-Type": kind}
    found = server.post("/v1/completions", content=content, headers=headers)
    assert found.status_code == status, found.text
    assert told in found.text
