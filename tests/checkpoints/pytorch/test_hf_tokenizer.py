"""Tokenizer files and model cards of exports, opened by transformers."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import bltjax
from bltjax.checkpoints.pytorch import hf_tokenizer
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.pytorch.model_card import card
from bltjax.checkpoints.weights import Weights
from bltjax.config import PatchingConfig
from bltjax.config.chat import ChatConfig
from bltjax.data import conversations
from bltjax.vocabulary import encode
from tests import directories

transformers = pytest.importorskip("transformers", reason="the oracle is transformers>=5.23")
TALK = [
    dict(role="system", content="Be brief."),
    dict(role="user", content="Ünö <|user|>?"),
    dict(role="assistant", content="Dös 'quoted'\\n."),
]


def opened(directory, chat=None):
    for name, content in hf_tokenizer.files(chat).items():
        (directory / name).write_text(json.dumps(content))
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("tokenizer"))


@hypothesis.given(st.text(st.characters(codec="utf-8")))
def test_ids_are_bytes_and_come_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == encode(text, add_eos=False).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]


def test_every_byte_has_its_id(tokenizer):
    names = tokenizer.convert_ids_to_tokens(list(range(260)))
    assert names[:4] == ["<|pad|>", "<|bos|>", "<|eos|>", "<|bpe|>"]
    assert names[4:] == hf_tokenizer.letters() and len(set(names)) == 260
    assert len(tokenizer) == 260
    assert tokenizer.decode([4 + b for b in "日本🎈".encode()]) == "日本🎈"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("text", ["<|bos|>", "a<|eos|>b", "<|pad|>"])
def test_names_of_special_ids_in_a_text_are_text(tokenizer, text):
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [4 + b for b in text.encode()]


@pytest.mark.parametrize("chat", [ChatConfig(), ChatConfig(template="text")], ids=str)
def test_a_chat_has_its_template(tmp_path, chat):
    tokenizer = opened(tmp_path, chat)
    talk = [dict(m, content=m["content"].replace("<|user|>", "")) for m in TALK]
    for given, answer in ((talk, False), (talk[:2], True)):
        data = conversations.to_bytes(given, chat, answer)
        options = dict(tokenize=True, add_generation_prompt=answer, return_dict=False)
        found = tokenizer.apply_chat_template(given, **options)
        assert found == [4 + b for b in data]


def test_an_export_has_all_that_transformers_opens(tmp_path):
    source = directories.hub(tmp_path / "hf", "hf_A_1b_like")
    summary = convert(source, tmp_path / "target", "hf")
    assert not any("tokenizer" in note for note in summary["notes"])
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "target")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    inputs = tokenizer("naïve 日本", return_tensors="pt")
    logits = model(inputs["input_ids"]).logits.detach().numpy()
    ours = bltjax.load(tmp_path / "target").logits(inputs["input_ids"].numpy())
    np.testing.assert_allclose(logits, ours, rtol=0, atol=1e-4)
    text = (tmp_path / "target" / "README.md").read_text()
    assert "license:  # fill in" in text and f"{summary['parameters']:,} parameters" in text
    again = convert(tmp_path / "target", tmp_path / "again", "hf")
    assert again["parameters"] == summary["parameters"]


def test_the_card_of_a_run_says_what_was_measured():
    sources = dict(code=dict(bits_per_byte=1.5, bytes=1000), prose=dict(bits_per_byte=2, bytes=9))
    config = dict(
        blt_training=dict(steps=10, batch_size=2, row_bytes=64),
        data=dict(sources=[], root="texts", records=""),
        start_from="demo",
    )
    result = dict(sources=sources, patch_use=dict(zeroed=0.25))
    weights = Weights(None, None, PatchingConfig(), {}, run=dict(config=config, result=result))
    text = card(weights, 1234)
    assert "1,234 parameters" in text and "| code | 1,000 | 1.500 |" in text
    assert "10 steps of 2 rows of 64 bytes, 1,280 bytes" in text and "started from: demo" in text
    assert "text: texts" in text and "0.250 bits more" in text
