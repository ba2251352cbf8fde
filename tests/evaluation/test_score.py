"""Scores: those of the model on the document alone, in any company, with few compilations."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    HashConfig,
    PatchingConfig,
    TransformerConfig,
)
from bltjax.data.batches.packing import pack_bytes, pack_patches
from bltjax.data.records.entropies import receptive_bytes
from bltjax.evaluation import score as module
from bltjax.evaluation.score import (
    BLTScoring,
    ByteScoring,
    document_entropies,
    score_documents,
)
from bltjax.model import functional
from bltjax.patching.boundaries import patch_starts
from bltjax.patching.buffers import buffers_from_lengths, buffers_from_starts
from bltjax.patching.entropy import next_byte_entropy
from bltjax.vocabulary import BYTE_OFFSET, encode

pytestmark = pytest.mark.long  # one interpreter will do


def stack(dim, layers, window=None):
    return TransformerConfig(dim, layers, num_heads=2, window=window, ffn_multiple_of=16)


CONFIG = BLTConfig(
    local_encoder=stack(16, 1, window=6),
    global_transformer=stack(24, 2),
    local_decoder=stack(16, 1, window=6),
    cross_attention=CrossAttentionConfig(num_heads=2),
    hash=HashConfig((2, 3), vocab=101),
)
ENTROPY_CONFIG = EntropyModelConfig(stack(16, 2, window=6))
THRESHOLD = 5.07  # about every third byte of text has more entropy under these weights
RULES = {
    "entropy": PatchingConfig(rule="entropy", threshold=THRESHOLD),
    "monotonic": PatchingConfig(rule="monotonic", threshold=0.1),
    "space": PatchingConfig(rule="space"),
    "byte": PatchingConfig(rule="byte"),
}
TEXT = b"Patches are short where text is hard, \x00\xff\xfe and long where it is easy.\n" * 3
each_rule = pytest.mark.parametrize("rule", RULES)


@functools.cache
def params(config):
    """Somewhat larger than initial weights, so that every part of the model matters."""
    rng = np.random.default_rng(0)
    shapes = functional.abstract_params(config)
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)


def score(documents, rule="entropy", **settings):
    models = CONFIG, params(CONFIG), ENTROPY_CONFIG, params(ENTROPY_CONFIG)
    return score_documents(BLTScoring(*models, RULES[rule]), documents, **settings)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, *inputs):
    return functional.apply(config, params(config), *inputs)


def nats_of(logits, targets):
    """-log p in float64 of logits [L, V] at targets [L]."""
    exact = np.asarray(logits, np.float64)
    top = exact.max(axis=1)
    normaliser = top + np.log(np.exp(exact - top[:, None]).sum(axis=1))
    return normaliser - exact[np.arange(len(targets)), targets]


def direct_entropies(ids):
    return np.asarray(next_byte_entropy(logits(ENTROPY_CONFIG, ids[None])))[0]


def direct(document, rule="entropy"):
    """Nats and patches from one pass over the document alone, without any padding."""
    ids = encode(document, add_eos=False)
    starts = patch_starts(RULES[rule], ids, direct_entropies(ids))[None]
    out = logits(CONFIG, ids[None], buffers_from_starts(jnp.asarray(starts), len(ids) + 1))
    return nats_of(out[0, :-1], ids[1:]).sum(), starts.sum()


def over_rows(document, rule, row_bytes):
    """Nats and patches, from whole rows one at a time and entropies of the whole document."""
    ids = encode(document)
    entropies = direct_entropies(np.pad(ids, (0, 256 - len(ids))))  # one shape; EOS ends the text
    starts = patch_starts(RULES[rule], ids, entropies[: len(ids)])[: len(ids)]
    total = 0.0
    for row in pack_patches([(ids, starts)], row_bytes, row_bytes):
        patches = buffers_from_lengths(jnp.asarray(row.patch_lengths)[None], row_bytes)
        out = logits(CONFIG, row.tokens[None], patches, row.document_ids[None])
        total += nats_of(out[0], row.targets)[row.loss_mask & (row.targets >= BYTE_OFFSET)].sum()
    return total, starts.sum()


def close(document, nats):
    return pytest.approx(nats, abs=2e-5 * len(document), rel=0)


@each_rule
def test_equals_one_pass_over_the_document_alone(rule):
    documents = [TEXT, b"\x00", b"", TEXT[:62]]
    scores = score(documents, rule)
    for document, found in zip(documents, scores, strict=True):
        nats, num_patches = direct(document, rule) if document else (0.0, 2)
        assert found.nats == close(document, nats)
        assert (found.num_bytes, found.num_patches) == (len(document), num_patches)
        if document:
            bits = found.nats / len(document) / math.log(2)
            assert found.bits_per_byte == pytest.approx(bits, rel=1e-12) and bits > 7
    assert math.isnan(scores[2].bits_per_byte)
    if rule == "entropy":
        assert 2.5 < len(TEXT) / scores[0].num_patches < 4.5  # or the test would show little


# Few lengths, since each is compiled for the direct pass.
documents = st.sampled_from([1, 7, 62]).flatmap(lambda n: st.binary(min_size=n, max_size=n))


@hypothesis.settings(max_examples=60)
@hypothesis.given(documents, st.sampled_from(sorted(RULES)))
def test_any_bytes(document, rule):
    h = direct_entropies(encode(document, add_eos=False))
    margins = [np.abs(h - THRESHOLD), np.abs(np.diff(h) - RULES["monotonic"].threshold)]
    hypothesis.assume(min(m.min(initial=1.0) for m in margins) > 1e-4)
    (found,) = score([document], rule)
    nats, num_patches = direct(document, rule)
    assert found.nats == close(document, nats)
    assert found.num_patches == num_patches


def mixed_documents():
    rng = np.random.default_rng(1)
    return [rng.bytes(n) for n in rng.integers(1, 200, 15)] + [TEXT, TEXT[:62], b"", "é\ud800", "a"]


@each_rule
def test_a_score_depends_on_the_document_alone(rule, monkeypatch):
    """Bit for bit, in any order and company, with documents of one row and of several."""
    documents = mixed_documents()
    scores = score(documents, rule, row_bytes=128)
    order = np.random.default_rng(2).permutation(len(documents))
    company = [b"", *mixed_documents()[3:12], TEXT[:50]]
    shuffled = company + [documents[i] for i in order]
    found = score(shuffled, rule, row_bytes=128)[len(company) :]
    assert repr(found) == repr([scores[i] for i in order])
    for i in (0, 15, 17, 18):
        assert repr(score([documents[i]], rule, row_bytes=128)) == repr([scores[i]])
    monkeypatch.setattr(module, "_CHUNK_BATCHES", 0)  # the entropies of one document at a time
    assert repr(score(documents, rule, row_bytes=128)) == repr(scores)
    assert scores[18].num_bytes == 2  # the lone surrogate has no bytes


@each_rule
@pytest.mark.parametrize("num_bytes", [60, 61, 62, 63, 126, 190, len(TEXT)])
def test_long_documents_are_the_sum_of_their_rows(rule, num_bytes):
    """The lengths around 62 and 126 (with BOS and EOS 64 and 128) just fit in rows, or do not."""
    document = TEXT[:num_bytes]
    (found,) = score([document], rule, row_bytes=64)
    nats, num_patches = over_rows(document, rule, 64)
    assert found.nats == close(document, nats)
    assert found.num_patches == num_patches
    if num_bytes == 190:  # the context does restart
        assert abs(found.nats - score([document], rule)[0].nats) > 0.01


def test_windows_of_a_long_document_have_the_entropies_of_the_whole(monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 64)
    assert 4 * receptive_bytes(ENTROPY_CONFIG) <= 64
    ids = [encode(text) for text in (TEXT, TEXT[:62], b"", TEXT[:63], TEXT[:128])]
    found = document_entropies(ENTROPY_CONFIG, params(ENTROPY_CONFIG), ids)
    for entropies, i in zip(found, ids, strict=True):
        np.testing.assert_allclose(entropies, direct_entropies(i), rtol=0, atol=1e-5)
        (alone,) = document_entropies(ENTROPY_CONFIG, params(ENTROPY_CONFIG), [i])
        np.testing.assert_array_equal(alone, entropies)  # in no other company either


def test_a_hundred_kilobytes():
    document, seen = np.random.default_rng(3).bytes(100_000), []
    (found,) = score([document], "space", row_bytes=1024, on_progress=seen.append)
    assert found.num_bytes == sum(seen) == 100_000 and len(seen) > 5
    assert 7 < found.bits_per_byte < 12
    pieces = score([document[:5000], document[:50_000]], "space", row_bytes=1024)
    assert pieces[0].nats < pieces[1].nats < found.nats


def test_few_shapes_are_compiled_whatever_the_text():
    """At most 5 numbers of patch columns for each of the lengths 64 and 128."""
    rng, row_step = np.random.default_rng(4), module._row_nats
    row_step.clear_cache()
    module._entropy_fn.cache_clear()
    alphabets = [rng.choice(list(b"ab c.d\n"), 300).astype(np.uint8).tobytes(), TEXT, bytes(300)]
    for rule in ("space", "byte", "entropy"):
        lengths = rng.integers(0, 300, 70)
        score([alphabets[n % 3][:n] for n in lengths], rule, row_bytes=128)
    assert 3 <= row_step._cache_size() <= 10
    before = row_step._cache_size()
    entropy_fn = module._entropy_fn(ENTROPY_CONFIG, False)
    assert 2 <= entropy_fn._cache_size() <= 4  # 512 too: entropies are those of whole documents
    score([alphabets[n % 3][:n] for n in rng.permutation(lengths)], "byte", row_bytes=128)
    assert row_step._cache_size() == before


def test_shapes_are_tight_and_forty_at_most():
    shapes = set()
    for num_ids in range(2, 8193):
        length = module.fitting_length(num_ids, 8192)
        assert num_ids <= length and (length < 2 * num_ids or length == 64)
        for num_patches in {2, num_ids // 9, num_ids // 3, num_ids} - {0, 1}:
            columns = module._num_columns(num_patches, length)
            assert num_patches <= columns <= length
            assert columns < 2 * num_patches or columns == length // 16
            shapes.add((length, columns))
    assert len(shapes) == 40
    assert module.fitting_length(90, 100) == 100 and module._num_columns(20, 100) == 25


def test_the_same_scores_on_a_mesh(use_mesh, monkeypatch):
    documents = mixed_documents()[-6:]
    expected = score(documents, row_bytes=64)
    monkeypatch.setattr(module, "_MAX_ROWS", 1)  # per shard: a mesh has rows for all of them

    def placed(config):
        shapes = sharding.concrete(functional.abstract_params(config))
        return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params(config), shapes)

    with use_mesh(2, 2, 2):
        models = CONFIG, placed(CONFIG), ENTROPY_CONFIG, placed(ENTROPY_CONFIG)
        found = score_documents(BLTScoring(*models, RULES["entropy"]), documents, row_bytes=64)
    for one, other in zip(expected, found, strict=True):
        assert other.nats == pytest.approx(one.nats, abs=1e-4 * max(one.num_bytes, 1), rel=0)
        assert other[1:3] == one[1:3]


def test_a_byte_model_alone():
    documents, seen = [TEXT, TEXT[:62], b"a", b""], []
    model = ByteScoring(ENTROPY_CONFIG, params(ENTROPY_CONFIG))
    scores = score_documents(model, documents, row_bytes=128, on_progress=seen.append)
    for document, found in zip(documents, scores, strict=True):
        expected = 0.0
        for row in pack_bytes([encode(document)], 128):
            used = row.loss_mask & (row.targets >= BYTE_OFFSET)
            expected += nats_of(logits(ENTROPY_CONFIG, row.tokens[None])[0], row.targets)[
                used
            ].sum()
        assert found.nats == close(document, expected)
        assert (found.num_bytes, found.num_patches) == (len(document), 0)
    assert sum(seen) == sum(map(len, documents))
    alone = score_documents(model, [TEXT], row_bytes=128)
    assert alone == [scores[0]]


def test_rules_without_entropies_need_no_entropy_model():
    model = BLTScoring(CONFIG, params(CONFIG), None, None, RULES["space"])
    found = score_documents(model, ["two words"])
    assert found == score(["two words"], "space")
    assert score([]) == []


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match=r"rule 'entropy' needs .*: give entropy_model="):
        model = BLTScoring(CONFIG, params(CONFIG), None, None, RULES["entropy"])
        score_documents(model, ["text"])
    with pytest.raises(ValueError, match="documents is one str: give a list of documents"):
        score("text")
    with pytest.raises(ValueError, match=r"documents\[1\] is int: give bytes or str"):
        score(["text", 3])
    with pytest.raises(ValueError, match="row_bytes=7 must be at least 8"):
        score(["text"], row_bytes=7)
