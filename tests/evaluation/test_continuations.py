"""Continuations: against the full forward pass, in any company; and what bits per byte mean."""

import math
import warnings

import jax
import numpy as np
import pytest

import bltjax
from bltjax.api import Model
from bltjax.checkpoints.weights import Weights
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    HashConfig,
    PatchingConfig,
    TransformerConfig,
)
from bltjax.model import functional
from bltjax.vocabulary import BYTE_OFFSET, EOS_ID, encode
from tests import directories, golden

LENGTH = 48  # of the direct passes, so that one shape is compiled
TEXT = b"Patches are short \x00\xff where text is hard.\n" * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bltjax.load(directories.hub(tmp_path_factory.mktemp("hf") / "hf", "hf_A_1b_like"))


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    """An entropy model alone: rows have one shape for each length."""
    return bltjax.load(directories.hub(tmp_path_factory.mktemp("meta") / "meta", "meta_entropy"))


def direct_logits(model, text):
    """float64 [N, V] after each id of BOS + text; what follows a text changes nothing in it."""
    ids = encode(text, add_eos=False)
    tokens = np.full((1, LENGTH), 4 + 32, np.int32)
    tokens[0, : len(ids)] = ids
    lengths = None
    if model.config is not None:
        found = model.patch_lengths(tokens)
        lengths = np.pad(found, ((0, 0), (0, LENGTH + 1 - found.shape[1])))
    return model.logits(tokens, lengths)[0, : len(ids)].astype(np.float64)


def most_probable(logits):
    """The id that greedy decoding takes."""
    allowed = np.full(len(logits), -np.inf)
    allowed[EOS_ID], allowed[BYTE_OFFSET:] = logits[EOS_ID], logits[BYTE_OFFSET:]
    return int(allowed.argmax())


def direct(model, context, continuation):
    """(nats, is_greedy) of one pair from one pass over all of it."""
    ids = encode(context + continuation, add_eos=False)
    logits = direct_logits(model, context + continuation)
    nats, is_greedy = 0.0, True
    for at in range(len(ids) - len(continuation), len(ids)):
        before = logits[at - 1]
        nats += np.log(np.exp(before - before.max()).sum()) + before.max() - before[ids[at]]
        is_greedy &= most_probable(before) == ids[at]
    return nats, is_greedy


def greedy_text(model, context, num_bytes):
    text = context
    for _ in range(num_bytes):
        text += bytes([most_probable(direct_logits(model, text)[-1]) - BYTE_OFFSET])
    return text[len(context) :]


def check(model, pairs):
    found = model.score_continuations(pairs)
    for (context, continuation), score in zip(pairs, found, strict=True):
        nats, is_greedy = direct(model, context, continuation)
        assert score.nats == pytest.approx(nats, abs=2e-5 * max(len(continuation), 1))
        assert (score.num_bytes, score.is_greedy) == (len(continuation), is_greedy)
    return found


def test_equal_a_full_forward_pass_for_each(model):
    start = TEXT[:36]  # of one number of patch columns
    written = greedy_text(model, start, 3)
    pairs = [
        (start, written),
        (start, written[:2] + bytes([written[2] ^ 1])),
        (start + written[:2], written[2:] + b"?"),
        (b"", TEXT[:40]),
        (start[:30], b"\xff\x00"),
        (start[:30] + b"caf\xc3", b"\xa9"),
        (b"context", b""),
    ]
    found = check(model, pairs)
    assert [score.is_greedy for score in found] == [True, False, False, False, False, False, True]
    assert found[-1].nats == 0.0


def test_an_entropy_model_alone(byte_model):
    written = greedy_text(byte_model, b"ab", 2)
    found = check(byte_model, [(b"ab", written), (b"", b"ab"), (TEXT[:20], b"x y")])
    assert [score.is_greedy for score in found] == [True, False, False]
    of_text = byte_model.score_continuations([("caf\u00e9\ud800", " \u00e9")])
    assert of_text == byte_model.score_continuations([(b"caf\xc3\xa9", b" \xc3\xa9")])


def test_a_pair_in_any_company(model):
    """Bit for bit, in any order, in batches that are full and others."""
    rng = np.random.default_rng(0)
    pairs = [(rng.bytes(34 - n), rng.bytes(n)) for n in rng.integers(0, 8, 20)]
    found, done = model.score_continuations(pairs), []
    order = rng.permutation(20)
    shuffled = model.score_continuations([pairs[i] for i in order], on_progress=done.append)
    assert shuffled == [found[i] for i in order]
    assert model.score_continuations([pairs[3]]) == [found[3]]
    assert sum(done) == sum(score.num_bytes for score in found)


def test_a_long_context_keeps_its_last_bytes(byte_model):
    context, continuation = TEXT[:120], b" is easy"
    kept = 64 - 2 - len(continuation)
    with pytest.warns(UserWarning, match=r"1 of 2 contexts are cut .* rows hold 64"):
        cut, whole = byte_model.score_continuations(
            [(context, continuation), (context[-kept:], continuation)], row_bytes=64
        )
    assert cut == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = byte_model.score_continuations([(context[-kept:], continuation)], row_bytes=64)
    assert one == [whole]
    # Windows of the model of bytes are shorter than the row.
    less = context[-3:] if byte_model.config is None else context[1 - kept :]
    assert cut != byte_model.score_continuations([(less, continuation)])[0]


def test_a_long_continuation_goes_on_in_further_rows(byte_model):
    """As a document does, half a row of context before it."""
    text = TEXT[:150]
    (found,) = byte_model.score_continuations([("", text)], row_bytes=64)
    (score,) = byte_model.score([text], row_bytes=64)
    assert found.num_bytes == 150 and not found.is_greedy
    assert found.nats == pytest.approx(score.nats, abs=1e-3)
    with pytest.warns(UserWarning, match="cut"):
        (after,) = byte_model.score_continuations([(TEXT[:40], text)], row_bytes=64)
    before = byte_model.score([TEXT[8:40] + text, TEXT[8:40]], row_bytes=64)
    assert after.nats == pytest.approx(before[0].nats - before[1].nats, abs=1e-3)


@pytest.mark.long
def test_long_continuations_in_patches(model):
    test_a_long_continuation_goes_on_in_further_rows(model)
    test_a_long_context_keeps_its_last_bytes(model)


def test_what_is_no_pair_is_refused(model):
    for wrong in ("ab", (b"a", 1), (b"a", b"b", b"c"), 3):
        with pytest.raises(ValueError, match=r"pairs\[1\] is .*: give \(context, continuation\)"):
            model.score_continuations([("a", "b"), wrong])
    with pytest.raises(ValueError, match="row_bytes=7 must be at least 8"):
        model.score_continuations([], row_bytes=7)
    assert model.score_continuations([]) == []


@pytest.mark.long
def test_on_a_mesh(model, use_mesh, tmp_path):
    pairs = [(b"ab", b"cd"), (TEXT[:40], TEXT[40:60]), (b"", b"z")]
    expected = model.score_continuations(pairs)
    with use_mesh(2, 2, 2):
        sharded = bltjax.load(directories.hub(tmp_path / "hf", "hf_A_1b_like"))
    for one, other in zip(expected, sharded.score_continuations(pairs), strict=True):
        assert other.nats == pytest.approx(one.nats, abs=1e-4) and other[1:] == one[1:]


def test_bits_per_byte_of_a_converted_model_are_its_published_twins(model):
    """From the logits that the PyTorch code computed."""
    expected = golden.arrays("hf_A_1b_like")
    for name in ("logits_hf", "logits_meta"):
        logits, ids = expected[name].astype(np.float64), expected["tokens"]
        chosen = np.take_along_axis(logits[:, :-1], ids[:, 1:, None], 2)[..., 0]
        nats = (np.log(np.exp(logits[:, :-1]).sum(-1)) - chosen).sum(1)
        scores = model.score([bytes((row[1:] - BYTE_OFFSET).tolist()) for row in ids])
        for score, total in zip(scores, nats, strict=True):
            bits = total / math.log(2) / (ids.shape[1] - 1)
            assert score.bits_per_byte == pytest.approx(bits, rel=1e-5) and bits > 8.2


def uniform(config, special: float) -> Model:
    """A model whose logits are 0 for every byte and `special` for the four special ids.

    All bytes are embedded as ones, every block adds nothing, and norms keep ones as they are.
    """
    stack = TransformerConfig(16, 1, num_heads=2, ffn_multiple_of=16)
    entropy = EntropyModelConfig(stack)
    blt = BLTConfig(stack, stack, stack, CrossAttentionConfig(num_heads=2), HashConfig((3,), 7))
    name, config = ("blt", blt) if config is BLTConfig else ("entropy_model", entropy)

    def filled(path, leaf):
        key = jax.tree_util.keystr(path)
        value = np.zeros(leaf.shape, np.float32)
        if "norm" in key or "tok_embeddings" in key:
            value[...] = 1.0
        if key.endswith("['output']['weight']"):
            value[:BYTE_OFFSET] = special / 16
        return value

    params = jax.tree_util.tree_map_with_path(filled, functional.abstract_params(config))
    weights = Weights(None, None, PatchingConfig(rule="space"), {name: params})
    return Model(weights._replace(**{name: config}), jax.sharding.get_mesh())


@pytest.mark.parametrize("config", [BLTConfig, EntropyModelConfig])
@pytest.mark.parametrize("special, bits", [(0.0, math.log2(260)), (-200.0, 8.0)])
def test_bits_per_byte_of_a_uniform_model(config, special, bits):
    """log2 of what it chooses from: all 260 ids, or the 256 bytes alone, where it is 8 exactly."""
    model = uniform(config, special)
    (score,) = model.score([TEXT[:60]])
    assert score.bits_per_byte == pytest.approx(bits, rel=1e-6)
    if config is EntropyModelConfig:
        (found,) = model.score_continuations([(TEXT[:50], "thing")])
        assert found.nats / math.log(2) / 5 == pytest.approx(bits, rel=1e-6)
