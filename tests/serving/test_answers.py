"""Texts that come one byte at a time: whole characters, entries for every byte, one end."""

import numpy as np
import pytest

from bltjax.serving import asked
from bltjax.serving.answers import Choice, Form, most_probable
from bltjax.serving.errors import RequestError

WORDS = ["👩‍👩‍👧 and 👋🏽", "ភាសាខ្មែរ", "naïve\n"]


def certain(data):
    """Log-probabilities under which each byte is certain, float32 [bytes, 260]."""
    log_p = np.full((len(data), 260), -np.inf, np.float32)
    log_p[np.arange(len(data)), np.frombuffer(data, np.uint8).astype(int) + 4] = 0
    return log_p


def deltas(choice, data, finish="stop"):
    """The bytes one by one, and then the end."""
    for byte in data:
        yield choice.add(bytes([byte]), certain(bytes([byte])), None)
    yield choice.add(b"", certain(b""), finish)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("chat", [False, True])
def test_bytes_one_at_a_time(word, chat):
    body = dict(prompt="", logprobs=2)
    wanted = asked.completion(body)
    form = Form("m", chat, wanted)
    found = list(deltas(Choice(0, wanted), word.encode()))
    assert [delta.text for delta in found if delta.text] == list(word)
    assert [delta.finish for delta in found[:-1]] == [None] * len(word.encode())
    whole = form.whole(found, {})["choices"][0]
    assert whole["finish_reason"] == "stop"
    if chat:
        assert whole["message"]["content"] == word
        entries = whole["logprobs"]["content"]
        assert bytes(byte for entry in entries for byte in entry["bytes"]) == word.encode()
    else:
        assert whole["text"] == word and bytes(whole["logprobs"]["bytes"]) == word.encode()
        assert "".join(word[at] for at in sorted({*whole["logprobs"]["text_offset"]})) == word
        for top in whole["logprobs"]["top_logprobs"]:
            assert max(top.values()) == 0 and len(top) == 2  # -inf is no JSON


def test_half_a_character_at_the_end_is_replaced():
    wanted = asked.completion({})
    found = list(deltas(Choice(0, wanted), "a👋".encode()[:-1], "length"))
    assert "".join(delta.text for delta in found) == "a\ufffd"
    assert found[-1].text == "\ufffd" and found[-1].finish == "length"


def test_an_echo_and_its_text_may_share_a_character():
    """The prompt ends in the first bytes of a character, and the model writes the others."""
    data = "日".encode()
    wanted = asked.completion(dict(prompt=list(data[:1]), echo=True))
    choice = Choice(0, wanted)
    found = [choice.begin(wanted.prompts[0], None), *deltas(choice, data[1:])]
    assert [delta.text for delta in found if delta.text] == ["日"]
    alone = list(deltas(Choice(0, asked.completion(dict(prompt=list(data[:1])))), data[1:]))
    assert "".join(delta.text for delta in alone) == data[1:].decode("utf-8", "replace")


def test_the_end_is_most_probable_or_a_byte_is():
    log_p = np.zeros(260, np.float32)
    log_p[[0, 1, 3]] = 9  # ids that cannot be drawn
    log_p[[2, 70]] = 1, 2
    assert most_probable(log_p) == (b"B", "length")
    log_p[2] = 3
    assert most_probable(log_p) == (b"", "stop")


def test_requests_in_the_words_of_the_engine():
    found = asked.completion(
        dict(prompt=["ab", "c"], n=2, seed=-1, stop="\nQ:", top_k=3, min_p=0, max_tokens=5)
    )
    assert found.stops == (b"\nQ:",) and found.sampling.min_p is None and found.sampling.top_k == 3
    jobs = found.jobs()
    assert [job.request.seed for job in jobs] == [2**32 - 1, 0] * 2
    assert [job.request.ids.tolist() for job in jobs[1:3]] == [[1, 101, 102], [1, 103]]
    assert not found.needs_no_loop and not jobs[0].log_probs
    assert asked.completion(dict(prompt=[256, 65])).prompts == [asked.Prompt(b"A", True)]
    assert asked.completion(dict(prompt="\ud800\udcff")).prompts[0].data == b"\xff"
    assert asked.completion(dict(prompt="", max_tokens=0)).needs_no_loop
    scoring = dict(prompt="a", max_tokens=1, logprobs=1, echo=True, temperature=0)
    assert asked.completion(scoring).needs_no_loop
    for other in (dict(temperature=1), dict(max_tokens=2), dict(stop="a"), dict(echo=False)):
        assert not asked.completion(scoring | other).needs_no_loop
    with pytest.raises(RequestError, match="include_usage must be"):
        asked.completion(dict(stream_options=dict(include_usage=3)))
