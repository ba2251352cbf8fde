"""The lesson in words: which are drawn and how rows are cut, that patches become embeddings."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.checkpoints import formats
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.pytorch import llama
from bltjax.checkpoints.weights import flat
from bltjax.data import tokenizer
from bltjax.data.teacher_tokens import TeacherTokenizer
from bltjax.recipe import vocabulary_lesson
from bltjax.recipe.byteify import LocalSizes, byteify
from bltjax.recipe.vocabulary_lesson import drawn_rows, words_of
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET
from tests import llamas

SMALL = LocalSizes(dim=16, heads=2, decoder_layers=1, window=16, hash_sizes=(3, 4), hash_vocab=4096)
TEXT = b"a patch is short where the next byte is hard to guess and long elsewhere\n" * 9


@given(st.dictionaries(st.integers(0, 500), st.binary(max_size=80), max_size=40))
def test_words_are_tokens_with_one_space_which_comes_first(pieces):
    expected = {
        i: piece[1:]
        for i, piece in pieces.items()
        if 1 < len(piece) <= 64 and piece[0] == 32 and 32 not in piece[1:]
    }
    if not expected:
        with pytest.raises(ValueError, match="vocabulary_steps=0"):
            words_of(pieces)
        return
    words = words_of(pieces)
    assert dict(zip(words.ids.tolist(), words.texts, strict=True)) == expected
    assert list(words.ids) == sorted(expected)


@given(
    st.lists(st.binary(min_size=1, max_size=63), min_size=1, max_size=9),
    st.booleans(),
    st.integers(0, 99),
)
def test_patches_of_drawn_rows_are_words_and_a_space(texts, space_first, seed):
    words = vocabulary_lesson.Words(np.arange(len(texts)), texts, space_first)
    rows = drawn_rows(words, np.random.default_rng(seed))
    for tokens, lengths, places in zip(*rows, strict=True):
        assert tokens[0] == BOS_ID and lengths[0] == 1 and places[0] == -1
        ends = np.cumsum(lengths)
        found = (places >= 0).nonzero()[0]
        assert len(found) and list(found) == list(range(1, 1 + len(found)))
        for patch in found:
            data = tokens[ends[patch] - lengths[patch] : ends[patch]] - BYTE_OFFSET
            text = texts[places[patch]]
            expected = b" " + text if space_first else text + b" "
            assert data.astype(np.uint8).tobytes() == expected
        assert (lengths[found[-1] + 1 :] == 0).all() and not tokens[ends[-1] :].any()


def test_frequent_words_are_drawn_more_often():
    words = vocabulary_lesson.Words(np.array([0, 100_000]), [b"a", b"b"])
    drawn = drawn_rows(words, np.random.default_rng(0)).words
    assert (drawn == 0).sum() > 20 * (drawn == 1).sum() > 0


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_lessons_of_few_steps_have_rates(steps):
    schedule = vocabulary_lesson.rate_schedule(steps)
    rates = np.array([schedule(step) for step in range(steps)])
    assert rates.max() == pytest.approx(vocabulary_lesson.RATE) and (rates >= 0).all()


@pytest.mark.long
def test_patches_of_words_become_the_embeddings_of_the_source(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="the extra tokens")
    for name, value in dict(RATE=1e-2, ROWS=8, ROW_BYTES=128, ROW_WORDS=32).items():
        monkeypatch.setattr(vocabulary_lesson, name, value)
    source = llamas.write(tmp_path / "source", vocab_size=300)
    text = tokenizer.train([TEXT], 300).text
    (source / "tokenizer.json").write_text(text)
    plain = byteify(source, tmp_path / "plain", sizes=SMALL)
    assert plain["word_distance"] is None
    taught = byteify(source, tmp_path / "taught", sizes=SMALL, vocabulary_steps=120)
    assert taught["word_distance"] < 0.1  # of drawn words; 1 would be as good as zeros
    # Measured apart: on rows of other draws, through the weights as they were written.
    weights, model = formats.read(tmp_path / "taught"), llama.read(source)
    words = words_of(TeacherTokenizer(text).pieces)
    embeddings = np.asarray(read_all(model.embeddings), np.float32)[words.ids]
    rows = drawn_rows(words, np.random.default_rng(99))
    params = jax.tree.map(read_all, weights.params["blt"])
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        found = vocabulary_lesson._distance(weights.blt, params, embeddings, *rows)
    assert found < 0.1
    # All but the encoder and what it reads by is as without the lesson.
    before, after = (
        flat(jax.tree.map(read_all, formats.read(tmp_path / name).params["blt"]))
        for name in ("plain", "taught")
    )
    changed = {n.split(".")[0] for n in before if not np.array_equal(before[n], after[n])}
    assert changed and not changed & {"local_decoder"}
    layers = [n for n in before if n.startswith("global_transformer.layers.")]
    assert all(np.array_equal(before[n], after[n]) for n in layers)


@pytest.mark.long
def test_a_lesson_needs_the_tokenizer_of_the_source(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra tokens")
    source = llamas.write(tmp_path / "source", vocab_size=300)
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json: give the path of one"):
        byteify(source, tmp_path / "target", sizes=SMALL, vocabulary_steps=2)
    other = tmp_path / "tokenizer.json"
    content = json.loads(tokenizer.train([TEXT * 2 + b"quick brown fox " * 50], 320).text)
    other.write_text(json.dumps(content))
    said = r"has 3\d\d tokens, and the model has embeddings of 300: give .* as --tokenizer"
    with pytest.raises(ValueError, match=said):
        byteify(source, tmp_path / "target", sizes=SMALL, vocabulary_steps=2, tokenizer=other)
    assert not (tmp_path / "target").exists()
