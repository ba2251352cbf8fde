"""Conversations with kept caches: the same bytes as when everything is read anew."""

import dataclasses
import random

import pytest

import bltjax
from bltjax.config.chat import ChatConfig
from bltjax.data import conversations
from bltjax.inference.conversation import Conversation
from bltjax.vocabulary import decode
from tests import directories

WORDS = ["patch", "byte", "naïve", "日本", "x = 1;", "?", "\n", "🎈"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model of random weights that knows turns."""
    model = bltjax.load(directories.hub(tmp_path_factory.mktemp("m") / "hf", "hf_A_1b_like"))
    model.patching = dataclasses.replace(model.patching, turns=True, threshold=5.0)
    model._chat = ChatConfig()
    return model


def turn(chance) -> dict:
    return dict(role="user", content=" ".join(chance.choices(WORDS, k=chance.randint(1, 5))))


@pytest.mark.long
def test_kept_caches_change_no_byte(model):
    """50 conversations; answers are drawn, so that some end in EOS or in the end of a turn."""
    kept, calls, ends = 0, 0, set()
    for seed in range(50):
        chance, messages = random.Random(seed), []
        for _ in range(chance.randint(2, 4)):
            messages.append(turn(chance))
            options = dict(max_new_bytes=chance.randint(1, 24), temperature=1.0, seed=seed)
            answer = b"".join(model.chat_stream(messages, **options))
            calls, kept = calls + 1, kept + (model._conversation.kept > 0)
            anew = Conversation(model._decoder(), model._generation_params)
            kept_one, model.__dict__["_conversation"] = model._conversation, anew
            assert b"".join(model.chat_stream(messages, **options)) == answer, (seed, messages)
            assert anew.kept == 0
            model.__dict__["_conversation"] = kept_one
            ends.add(len(answer) < options["max_new_bytes"])
            messages.append(dict(role="assistant", content=answer))
    assert ends == {True, False}
    assert kept > calls / 3, (kept, calls)


def test_only_what_is_new_is_read(model):
    messages = [dict(role="user", content="one")]
    answer = b"".join(model.chat_stream(messages, max_new_bytes=8))
    first = model._conversation.kept
    messages += [dict(role="assistant", content=answer), dict(role="user", content="two")]
    b"".join(model.chat_stream(messages, max_new_bytes=8))
    begun = conversations.to_bytes(messages[:1], ChatConfig(), answer=True) + answer
    assert first == 0 and model._conversation.kept >= 1 + len(begun)
    b"".join(model.chat_stream([dict(role="user", content="other")], max_new_bytes=8))
    assert model._conversation.kept == 0


def test_an_answer_ends_at_any_turn(model, monkeypatch):
    given = {}

    def stream(self, request, sampling, stops):
        given.update(stops=stops, ids=request.ids)
        return iter([(b"yes", None)])

    monkeypatch.setattr(Conversation, "stream", stream)
    assert model.chat([dict(role="user", content="x")]) == "yes"
    assert set(given["stops"]) == {b"\xf8", b"\xf9", b"\xfa", b"\xfb"}
    assert decode(given["ids"]) == b"\xf9x\xfb\xfa"


def test_a_model_without_turns_says_so(tmp_path):
    model = bltjax.load(directories.hub(tmp_path / "hf", "hf_A_1b_like"))
    with pytest.raises(ValueError, match="was not trained on conversations: train it on a source"):
        model.chat([dict(role="user", content="x")])
