"""What must hold of every model, whatever its settings: design section 4, invariants 2 to 5."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.config import BLTConfig, CrossAttentionConfig, HashConfig, TransformerConfig
from bltjax.model import functional
from bltjax.model.blt import patch_documents
from bltjax.patching.boundaries import document_segments
from bltjax.patching.buffers import buffers_from_starts
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID

pytestmark = pytest.mark.long  # one interpreter will do

L = 18
CLOSE = dict(rtol=0, atol=2e-5)


def stack(dim, layers, heads=2, **settings):
    return TransformerConfig(
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        ffn_multiple_of=8,
        ffn_dim_multiplier=0.5,
        **settings,
    )


def tiny(
    encoder_layers=1,
    decoder_layers=2,
    global_dim=16,
    window=5,
    cross=CrossAttentionConfig(),
    sizes=(),
    kv_heads=None,
    **settings,
):
    return BLTConfig(
        local_encoder=stack(8, encoder_layers, window=window, num_kv_heads=kv_heads),
        global_transformer=stack(global_dim, 2, num_kv_heads=kv_heads),
        local_decoder=stack(8, decoder_layers, window=window, num_kv_heads=kv_heads),
        cross_attention=dataclasses.replace(cross, num_heads=2),
        hash=HashConfig(sizes, vocab=31, num_functions=settings.pop("num_functions", 1)),
        **settings,
    )


CONFIGS = {
    "released": tiny(sizes=(3, 5)),
    "in-projection, grouped queries, mean": tiny(
        global_dim=20,
        cross=CrossAttentionConfig(k=3, all_layers_decoder=False),
        kv_heads=1,
        pooling="mean",
        sizes=(2, 3),
        num_functions=2,
    ),
    "windows, all layers": tiny(
        encoder_layers=3,
        decoder_layers=1,
        cross=CrossAttentionConfig(all_layers_encoder=True, window_encoder=2, window_decoder=3),
    ),
    "no cross-attention": tiny(
        cross=CrossAttentionConfig(encoder=False, decoder=False), sizes=(4,)
    ),
    "encoder only, min": tiny(
        encoder_layers=2,
        cross=CrossAttentionConfig(decoder=False, doubled_residual=False),
        pooling="min",
        window=1,
    ),
    "decoder only, window over the row": tiny(
        window=100, cross=CrossAttentionConfig(encoder=False, k=1, window_decoder=100)
    ),
}


def random_config(seed):
    rng = np.random.default_rng(seed)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    cross = CrossAttentionConfig(
        encoder=pick(True, True, False),
        decoder=pick(True, True, False),
        k=pick(1, 2, 3),
        all_layers_encoder=pick(True, False),
        all_layers_decoder=pick(True, False),
        window_encoder=pick(None, 1, 4),
        window_decoder=pick(None, 1, 4),
        doubled_residual=pick(True, False),
    )
    return tiny(
        pick(1, 2),
        pick(1, 3),
        pick(8, 24) if cross.k == 1 else pick(12, 24),
        pick(2, 7),
        cross,
        pick((), (2,), (3, 1)),
        pick(None, 1),
        pooling=pick("max", "min", "mean"),
        num_functions=pick(1, 3),
    )


CONFIGS |= {f"random {seed}": random_config(seed) for seed in (1, 2)}


def each(*names):
    return pytest.mark.parametrize("name", names or CONFIGS)


@functools.cache
def model(name):
    """Random parameters, and jitted (tokens, starts, documents) -> intermediates."""
    config = CONFIGS[name]
    assert not config.problems("config")
    shapes = functional.abstract_params(config)
    rng = np.random.default_rng(0)
    # As large as an initial weight of this width; drawn by NumPy, which need not be compiled.
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.35, x.shape), jnp.float32), shapes)

    @functools.partial(jax.jit, static_argnames="num_patches")
    def run(tokens, starts, documents, num_patches):
        patches = buffers_from_starts(starts, num_patches)
        return functional.intermediates(config, params, tokens, patches, documents), patches

    return config, params, run


def logits_of(name, tokens, starts, documents=None, num_patches=L + 1):
    documents = np.zeros_like(tokens) if documents is None else documents
    logits = np.asarray(model(name)[2](tokens, starts, documents, num_patches)[0]["logits"])
    assert np.isfinite(logits).all()
    return logits


def random_bytes(rng, *shape):
    return rng.integers(BYTE_OFFSET, 260, shape).astype(np.int32)


def random_starts(rng, rows, positions=L + 1):
    """Boundaries as the patchers make them: at 0 and 1, then anywhere."""
    starts = rng.random((rows, positions)) < rng.uniform(0.1, 0.9, (rows, 1))
    starts[:, :2] = True
    return starts


@each()
def test_causal_by_prefix_runs(name):
    """Logits up to t stay when all later bytes change, and all boundaries after t + 1."""
    rng = np.random.default_rng(1)
    base, base_starts = random_bytes(rng, L), random_starts(rng, 1)[0]
    base[7] = EOS_ID
    tokens, starts = random_bytes(rng, L, L), random_starts(rng, L)
    for t in range(L):  # row t keeps bytes 0..t; whether a patch starts at t + 1 follows from them
        tokens[t, : t + 1], starts[t, : t + 2] = base[: t + 1], base_starts[: t + 2]
    logits = logits_of(name, tokens, starts)
    assert np.abs(logits[-1]).max() > 0.1
    for t in range(L):
        np.testing.assert_allclose(logits[t, : t + 1], logits[-1, : t + 1], **CLOSE)
        if t + 1 < L:
            assert np.abs(logits[t, t + 1 :] - logits[-1, t + 1 :]).max() > 1e-3


@each("released", "windows, all layers")
def test_causal_by_gradient(name):
    """All bytes differ, so each has its own embedding row: later rows get no gradient at all."""
    config, params, _ = model(name)
    rng = np.random.default_rng(2)
    tokens = rng.permutation(np.arange(BYTE_OFFSET, 260))[None, :L].astype(np.int32)
    patches = buffers_from_starts(random_starts(rng, 1), L + 1)
    weights = jnp.asarray(rng.normal(size=config.vocab_size), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(table, t):
        encoder = params["local_encoder"] | {"tok_embeddings": {"weight": table}}
        logits = functional.apply(config, params | {"local_encoder": encoder}, tokens, patches)
        return jnp.sum(logits[0] * (jnp.arange(L) == t)[:, None] * weights[None, :])

    for t in range(L):
        by_byte = np.abs(gradient(params["local_encoder"]["tok_embeddings"]["weight"], t))
        by_byte = by_byte[tokens[0]].max(-1)
        assert (by_byte[t + 1 :] == 0).all(), (t, by_byte)
        assert by_byte[t] > 0


@each()
def test_a_row_does_not_depend_on_its_batch(name):
    """The same row among other rows, in another place: bit for bit."""
    rng = np.random.default_rng(3)
    tokens, starts = random_bytes(rng, L, L), random_starts(rng, L)
    first = logits_of(name, tokens, starts)
    others, other_starts = random_bytes(rng, L, L), random_starts(rng, L)
    others[5], other_starts[5] = tokens[2], starts[2]
    np.testing.assert_array_equal(logits_of(name, others, other_starts)[5], first[2])


@each()
def test_a_row_does_not_depend_on_padding(name):
    """Alone, with padding after it and with more patch columns: the same logits."""
    rng = np.random.default_rng(4)
    tokens, starts = random_bytes(rng, L, L), random_starts(rng, L)
    tokens[1, 4] = EOS_ID
    documents = np.cumsum(tokens == EOS_ID, axis=1).astype(np.int32) - (tokens == EOS_ID)
    expected = logits_of(name, tokens, starts, documents)[1]
    longer = L + 7
    alone = np.full((1, longer), PAD_ID, np.int32)
    alone[0, :L] = tokens[1]
    longer_documents = np.full((1, longer), documents[1, -1] + 1, np.int32)
    longer_documents[0, :L] = documents[1]
    for tail in (False, True):  # padding joins the last patch, or makes its own
        longer_starts = np.full((1, longer + 1), tail)
        longer_starts[0, : L + 1] = starts[1]
        logits = logits_of(name, alone, longer_starts, longer_documents, num_patches=longer + 4)
        np.testing.assert_allclose(logits[0, :L], expected, **CLOSE)


def packed_rows(rng, rows, split):
    """Rows that end with the same document from `split` on, after different ones."""
    tokens, starts = random_bytes(rng, rows, L), random_starts(rng, rows)
    tokens[:, split - 1], tokens[:, split] = EOS_ID, BOS_ID
    tokens[:, split:], starts[:, split:] = tokens[0, split:], starts[0, split:]
    starts[:, split : split + 2] = True  # as packing does: a document opens with a patch of its BOS
    return tokens, starts


@each("windows, all layers", "encoder only, min", "random 1", "random 2")
def test_packed_documents_do_not_see_each_other(name):
    """Neither bytes nor boundaries of the document before reach the next one.

    Without n-grams, which span documents as published (model.md#n-grams), and without
    cross-attention windows past one patch, which do so too (model.md#cross-attention).
    """
    name = unlinked(name)
    rng, split = np.random.default_rng(5), 8
    tokens, starts = packed_rows(rng, L, split)
    # Explicit documents, and the ones that the model finds by EOS.
    documents = np.broadcast_to(np.arange(L) >= split, (L, L)).astype(np.int32)
    logits = logits_of(name, tokens, starts, documents)
    for row in logits[1:]:
        np.testing.assert_allclose(row[split:], logits[0, split:], **CLOSE)
        assert np.abs(row[: split - 1] - logits[0, : split - 1]).max() > 1e-3
    joined = logits_of(name, tokens, starts, np.zeros_like(documents))
    assert np.abs(joined[1, split:] - joined[0, split:]).max() > 1e-3


def unlinked(name):
    """The config without what links documents by design, under a name of its own."""
    config, label = CONFIGS[name], f"{name}, unlinked"
    cross = dataclasses.replace(config.cross_attention, window_encoder=None, window_decoder=None)
    CONFIGS.setdefault(
        label, dataclasses.replace(config, cross_attention=cross, hash=HashConfig(()))
    )
    return label


def test_documents_end_with_their_eos():
    """model.md#masks: an EOS ends its document, and a patch belongs to that of its first byte."""
    tokens = jnp.array([[1, 9, EOS_ID, 1, 9, 9, EOS_ID], [1, 9, 9, EOS_ID, EOS_ID, 9, 9]])
    documents = document_segments(tokens)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 2, 2]]
    starts = jnp.array([[0, 1, 3, 7, 8], [0, 3, 4, 6, 8]])  # 7 is the byte to come, 8 is unused
    assert patch_documents(tokens, documents, starts).tolist() == [[0, 0, 1, 2, 2], [0, 0, 1, 2, 2]]


def test_ngrams_span_documents():
    """Only max(n) - 1 bytes of a document see n-grams of the one before it (model.md#n-grams)."""
    rng, split = np.random.default_rng(7), 8
    tokens, starts = packed_rows(rng, L, split)
    documents = np.broadcast_to(np.arange(L) >= split, (L, L)).astype(np.int32)
    embedded = np.asarray(model("released")[2](tokens, starts, documents, L + 1)[0]["embedded"])
    free = split + max(CONFIGS["released"].hash.sizes) - 1
    np.testing.assert_array_equal(embedded[1:, free:], embedded[:-1, free:])
    assert (embedded[1:, split] != embedded[:-1, split]).any(-1).all()


@each("released", "no cross-attention")
def test_overflow_loses_no_byte(name):
    """Too few columns: the last takes the rest, lengths still sum to L + 1, and it stays causal."""
    rng, few = np.random.default_rng(8), 5
    tokens, starts = random_bytes(rng, L, L), random_starts(rng, L)
    starts[0] = True
    tokens[1], starts[1] = tokens[0], starts[0]
    tokens[1, 9:], starts[1, 10:] = random_bytes(rng, L - 9), False
    documents = np.zeros_like(tokens)
    result, patches = model(name)[2](tokens, starts, documents, few)
    assert (patches.lengths.sum(1) == L + 1).all()
    np.testing.assert_array_equal(patches.overflow, np.maximum(starts.sum(1) - few, 0))
    assert patches.overflow[0] == L + 1 - few
    assert np.isfinite(result["logits"]).all()
    np.testing.assert_allclose(result["logits"][0, :9], result["logits"][1, :9], **CLOSE)
    wide = logits_of(name, tokens, starts)
    fits = np.asarray(patches.overflow) == 0
    assert fits.any()
    np.testing.assert_allclose(np.asarray(result["logits"])[fits], wide[fits], **CLOSE)
