"""The token model from Python against brute force, with random weights."""

import copy

import jax
import numpy as np
import pytest

from bltjax import sharding
from bltjax.checkpoints.weights import Lengths
from bltjax.config import HashConfig, TokenModelConfig, TransformerConfig
from bltjax.data import tokenizer
from bltjax.evaluation.token_baseline.model import TokenModel
from bltjax.inference import room
from bltjax.inference.loops import decode
from bltjax.model import functional
from bltjax.vocabulary import BYTE_OFFSET, EOS_ID

WORDS = [b"the patch and the byte", "naïve 日本 naïve 日本".encode(), b"x = 12;\n x = 12;\n"]
TRAINED = tokenizer.train(WORDS * 3, 300)
ROW = 64


TABLES = dict(hash=HashConfig((2, 4), 5003, num_functions=2), hash_dim=8)


def made(window=None, **tables) -> TokenModel:
    """A model whose vocabulary is larger than the tokenizer's, and which likes long tokens."""
    stack = TransformerConfig(dim=16, num_layers=2, num_heads=2, ffn_multiple_of=8, window=window)
    config = TokenModelConfig(stack, vocab_size=len(TRAINED) + 7, **tables)
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.35, x.shape).astype(np.float32),
        functional.abstract_params(config),
    )
    params["output"]["weight"][260:] *= 2
    params["output"]["weight"][len(TRAINED) :] *= 2  # what must never be drawn
    return TokenModel(config, params, TRAINED, Lengths(row_bytes=ROW), jax.sharding.get_mesh())


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        return made()


def log_p(model, ids):
    """float64 [N, V]: log-probabilities of what follows each of some ids, all at once."""
    padded = np.zeros((1, ROW), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.float64(model.logits(padded)[0, : len(ids)])
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def nats_of(model, ids, first):
    """-log p of ids[first:], each given those before it, and whether all are the best."""
    found = log_p(model, ids)[first - 1 : len(ids) - 1]
    targets = np.array(ids[first:])
    drawable = np.zeros(found.shape[1], bool)
    drawable[BYTE_OFFSET : len(TRAINED)] = drawable[EOS_ID] = True
    best = np.where(drawable, found, -np.inf).argmax(axis=-1)
    return -found[np.arange(len(targets)), targets].sum(), bool((best == targets).all())


TEXTS = [b"", b"the patch", "the naïve byte".encode(), b"\xff\xfe 12;\n", b"x"]


def test_scores_are_those_of_the_logits(model):
    told = []
    scores = model.score(TEXTS, on_progress=told.append)
    for text, score in zip(TEXTS, scores, strict=True):
        ids = TRAINED.encode(text)
        expected, _ = nats_of(model, ids[:-1], 1)
        assert score.nats == pytest.approx(expected, rel=1e-5)
        assert (score.num_bytes, score.num_patches) == (len(text), len(ids))
    assert scores[1].bits_per_byte == pytest.approx(scores[1].nats / np.log(2) / 9)
    assert sum(told) == sum(map(len, TEXTS))


def test_scores_do_not_depend_on_the_company(model):
    long = WORDS[0] * 30  # of several rows
    alone = [model.score([text])[0] for text in (*TEXTS, long)]
    together = model.score([*WORDS, long, *TEXTS[::-1], *WORDS])[len(WORDS) : -len(WORDS)]
    np.testing.assert_equal(together[::-1], alone)


PAIRS = [
    ("the patch and", " the byte"),
    ("the patch ", b"and"),  # the blank goes with what follows
    ("", "x"),
    (b"na\xc3", b"\xafve"),  # half a character
    ("the", "n"),
    ("the  ", "n"),  # " n" takes one of the blanks
]


def test_continuations_are_those_of_the_logits(model):
    told = []
    found = model.score_continuations(PAIRS, on_progress=told.append)
    for (context, continuation), score in zip(PAIRS, found, strict=True):
        context, continuation = (
            x.encode() if isinstance(x, str) else x for x in (context, continuation)
        )
        ids = TRAINED.encode(context + continuation, add_eos=False)
        first = len(TRAINED.encode(context.rstrip(), add_eos=False))
        expected, greedy = nats_of(model, ids, min(first, len(ids) - 1))
        assert score.nats == pytest.approx(expected, rel=1e-5)
        assert (score.num_bytes, score.is_greedy) == (len(continuation), greedy)
    assert model.score_continuations(PAIRS[::-1])[::-1] == found
    assert [model.score_continuations([pair])[0] for pair in PAIRS] == found
    assert model.score_continuations([("the", "")])[0] == (0.0, 0, True)


def test_the_best_token_is_greedy(model):
    found = []
    for context in (b"x", b"the", b"12", b";", "日".encode(), b"\xff"):
        ids = TRAINED.encode(context, add_eos=False)
        best = int(log_p(model, ids)[-1, : len(TRAINED)].argmax())
        piece = TRAINED.decode([best])
        if piece and TRAINED.encode(context + piece, add_eos=False).tolist() == [*ids, best]:
            found.append(model.score_continuations([(context, piece)])[0].is_greedy)
    assert found and all(found)


def test_contexts_longer_than_a_row_are_cut_with_a_warning(model):
    context, continuation = WORDS[0] * 30, b" patch"
    with pytest.warns(UserWarning, match=f"1 of 2 contexts are cut to their last ids.* {ROW}:"):
        score, _ = model.score_continuations([(context, continuation), ("x", "y")])
    ids = TRAINED.encode(context + continuation, add_eos=False)
    expected, _ = nats_of(model, [ids[0], *ids[-ROW + 1 :]], ROW - 1)
    assert score.nats == pytest.approx(expected, rel=1e-5)


def test_a_continuation_longer_than_a_row_goes_on_in_further_rows(model):
    context, text = WORDS[0] * 9, b" byte patch" * 40
    with pytest.warns(UserWarning, match="1 of 1 contexts are cut"):
        (score,) = model.score_continuations([(context, text)])
    begin = len(TRAINED.encode(context, add_bos=False, add_eos=False))
    ids = TRAINED.encode(context + text, add_bos=False, add_eos=False)[begin - ROW // 2 :]
    ids, nats = np.concatenate([[1], ids]), []
    for start in range(0, len(ids) - 1, ROW):
        row, targets = ids[start : start + ROW], ids[start + 1 : start + ROW + 1]
        nats += list(-log_p(model, row)[np.arange(len(targets)), targets])
    assert score.nats == pytest.approx(sum(nats[ROW // 2 :]), rel=1e-5)
    assert score.num_bytes == len(text)


def slow_text(model, prompt, num_bytes):
    """Greedy text, everything computed anew for each token."""
    start = TRAINED.encode(prompt, add_eos=False).tolist()
    ids, text = list(start), b""
    while len(text) < num_bytes:
        found = log_p(model, ids)[-1]
        found[[0, 1, 3]] = found[len(TRAINED) :] = -np.inf
        ids.append(int(found.argmax()))
        if ids[-1] == EOS_ID:
            break
        text = TRAINED.decode(ids[len(start) :])
    return text[:num_bytes]


PROMPTS = ["the patch", b"", b"\xff\xfe", "naïve 日本 x = 12"]


@pytest.mark.parametrize(
    ("window", "chunk", "tables"),
    [(None, 128, {}), (8, 5, {}), (None, 2, TABLES), (8, 128, TABLES | dict(hash_dim=None))],
)
def test_greedy_text_is_that_of_computing_everything_anew(window, chunk, tables, monkeypatch):
    monkeypatch.setattr(room, "CHUNK", chunk)  # positions of a prompt that are read at once
    model = made(window, **tables)
    texts = model.generate(PROMPTS, max_new_bytes=18)
    assert texts == [slow_text(model, prompt, 18) for prompt in PROMPTS]
    assert max(map(len, texts)) == 18 and len(set(texts)) > 2


def test_what_is_asked_of_each_prompt(model):
    whole = model.generate(PROMPTS, max_new_bytes=20)
    limits = [3, 0, 20, 7]
    assert model.generate(PROMPTS, limits) == [
        text[:n] for text, n in zip(whole, limits, strict=True)
    ]
    stop = whole[0][4:6]
    expected = [text[: text.find(stop)] if stop in text else text for text in whole]
    assert model.generate(PROMPTS, 20, stop=[stop, b"not there"], batch_size=2) == expected
    assert len(expected[0]) <= 4
    assert model.generate([], 5) == []


def test_draws_follow_from_the_seed_alone(model):
    def drawn(prompts, seed, **options):
        return model.generate(prompts, 16, temperature=1.5, seed=seed, **options)

    texts = drawn(PROMPTS, [1, 2, 3, 4])
    assert texts == drawn(PROMPTS, [1, 2, 3, 4], batch_size=2)
    assert texts[2:] == drawn(PROMPTS[2:], [3, 4])
    assert not set(texts) & set(drawn(PROMPTS, 9))
    one, same = drawn(["y", "y"], [1, 1])
    assert one == same


def test_filters_of_sampling_apply_to_tokens(model):
    """Each of them, at its narrowest, leaves the most probable token alone."""
    greedy = model.generate(PROMPTS, 16)
    for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0)):
        assert model.generate(PROMPTS, 16, temperature=1.5, seed=1, **narrow) == greedy
    penalised = model.generate(PROMPTS, 16, repetition_penalty=1e6)
    assert penalised != greedy
    ids = TRAINED.encode(penalised[0]).tolist()
    assert len(ids) == len(set(ids))


def test_a_stream_is_the_text_in_pieces(model):
    (text,) = model.generate(PROMPTS[:1], 150)
    pieces = list(model.stream(PROMPTS[0], 150, stop=[b"not there"]))
    assert b"".join(piece for piece, _ in pieces) == text and len(pieces) > 2
    counts = pieces[-1][1]
    assert counts.new_bytes == len(text) == 150 and 0 < counts.steps < 150
    assert counts.patches == counts.global_calls == 0
    stop = text[70:74]
    pieces = list(model.stream(PROMPTS[0], 150, stop=stop))
    assert b"".join(piece for piece, _ in pieces) == text[: text.find(stop)]
    assert pieces[-1][1].steps < counts.steps  # it ends there


def test_equal_tokenizers_share_programs(model):
    model.generate(["x"], 3)
    before = decode._cache_size()
    other = copy.copy(model)
    other.tokenizer = tokenizer.Tokenizer(TRAINED.text)
    assert other.generate(["x"], 3) == model.generate(["x"], 3)
    assert decode._cache_size() == before and tokenizer.train(WORDS, 280) != TRAINED


@pytest.mark.long
def test_a_mesh_changes_nothing(model, use_mesh):
    with use_mesh(2, 1, 2):
        other = made()
    assert other.generate(PROMPTS[:3], 10) == model.generate(PROMPTS[:3], 10)
    pairs = zip(other.score(TEXTS), model.score(TEXTS), strict=True)
    assert all(a.nats == pytest.approx(b.nats, rel=1e-5) for a, b in pairs)


@pytest.mark.long
def test_tables_that_are_shared_by_a_mesh_change_nothing(use_mesh):
    model = made(**TABLES)
    with use_mesh(2, 2, 2):
        other = made(**TABLES)
    table = other.params["encoder_hash_tok_embedding"]["weight"]
    assert table.sharding.shard_shape(table.shape) == (4, 5120 // 4, 4)
    assert other.generate(PROMPTS, 10) == model.generate(PROMPTS, 10)
    pairs = zip(other.score(TEXTS), model.score(TEXTS), strict=True)
    assert all(a.nats == pytest.approx(b.nats, rel=1e-5) for a, b in pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts="text"), "prompts is one str: give a list"),
        (dict(prompts=[3]), r"prompts\[0\] is int: give bytes or str"),
        (dict(prompts=["x"], temperature=-1.0), "temperature=-1.0 must be a number 0 or more"),
        (dict(prompts=["x"], max_new_bytes=-1), "max_new_bytes=-1 must be a whole number"),
        (dict(prompts=["x"], seed=[1, 2]), "seed has 2 values for 1 prompts"),
        (dict(prompts=["x"], stop=""), "stop holds an empty string"),
        (dict(prompts=["x"], batch_size=0), "batch_size=0 must be"),
        (dict(prompts=["x"], valid_utf8=True), "valid_utf8=True needs a model of bytes"),
        (dict(prompts=["x"], max_drafts=2), "max_drafts=2: a model of tokens has no patches"),
        (dict(prompts=["x"], threshold=1.0), "threshold=1.0: a model of tokens has no patches"),
        (dict(prompts=["x"], top_k=0), "top_k=0 must be a whole number"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


def test_texts_that_are_none_are_refused(model):
    with pytest.raises(ValueError, match="documents is one bytes: give a list"):
        model.score(b"text")
    with pytest.raises(ValueError, match=r"pairs\[0\] is 'ab': give \(context, continuation\)"):
        model.score_continuations(["ab"])
    with pytest.raises(ValueError, match="row_bytes=7 must be at least 8"):
        model.score([b"text"], row_bytes=7)
    short = copy.copy(model)
    short.lengths = Lengths(row_bytes=16)
    with pytest.warns(UserWarning, match="may get 21 tokens long, and the model was trained on 16"):
        short.generate([b"\xff" * 20, "x"], 1)
