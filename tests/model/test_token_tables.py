"""Hash n-gram tables of token models against NumPy: rows, documents, widths, initial weights."""

import dataclasses

import jax
import numpy as np
import pytest

from bltjax.config import EntropyModelConfig, HashConfig, TokenModelConfig, TransformerConfig
from bltjax.model import functional
from bltjax.ops.hashing import PRIMES
from bltjax.vocabulary import BOS_ID, EOS_ID

STACK = TransformerConfig(dim=16, num_layers=1, num_heads=2, ffn_multiple_of=8)
TABLES = TokenModelConfig(STACK, vocab_size=9000, hash=HashConfig((2, 3), 997, num_functions=2))
NARROW = dataclasses.replace(TABLES, hash_dim=8)
# Rows as they are packed: one begins a document, one goes on with another; both hold a second.
ROWS = np.array(
    [
        [BOS_ID, 7000, 8999, 70, 70, EOS_ID, BOS_ID, 7000],
        [8999, 70, EOS_ID, BOS_ID, 7000, 8999, 70, 0],
    ],
    np.int32,
)
DOCUMENTS = np.array([[0] * 6 + [1] * 2, [0] * 3 + [1] * 5], np.int32)


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), functional.abstract_params(config)
    )


def embedded_by_numpy(config, params, ids):
    """float64 [N, E] of ids [N]: the definition of model.md#n-grams, over tokens."""
    tables, hashing = params["encoder_hash_tok_embedding"]["weight"], config.hash
    rows = np.zeros((len(ids), tables.shape[-1]))
    for t in range(len(ids)):
        columns = [(prime, n) for prime in PRIMES[: hashing.num_functions] for n in hashing.sizes]
        for table, (prime, n) in enumerate(columns):
            window = [int(ids[s]) if s >= 0 else 0 for s in range(t - n + 1, t + 1)]
            total = sum(x * prime**i for i, x in enumerate(window)) % 2**64
            signed = total - 2**64 if total >= 2**63 else total
            rows[t] += tables[table, signed % hashing.vocab]
    if config.hash_dim:
        rows = rows @ params["hash_projection"]["weight"].T
    return params["tok_embeddings"]["weight"][ids] + rows


@pytest.mark.parametrize("config", [TABLES, NARROW], ids=["width of the stack", "narrow"])
def test_the_rows_of_all_ngrams_are_added(config):
    """Within a row: what came before it counts as 0, and documents share n-grams, as in a BLT."""
    params = random_params(config)
    found = jax.jit(functional.intermediates, static_argnums=0)(config, params, ROWS, DOCUMENTS)
    for row, embedded in zip(ROWS, found["embedded"], strict=True):
        np.testing.assert_allclose(embedded, embedded_by_numpy(config, params, row), atol=1e-5)
    alone = embedded_by_numpy(config, params, ROWS[0, 6:])
    assert np.abs(found["embedded"][0, 6:] - alone).max(axis=-1).min() > 0.1  # it sees the EOS


def test_the_sum_may_be_known():
    params = random_params(NARROW)
    ngrams = np.random.default_rng(1).normal(size=(*ROWS.shape, 8)).astype(np.float32)
    found = functional.intermediates(NARROW, params, ROWS, DOCUMENTS, ngrams=ngrams)["embedded"]
    expected = params["tok_embeddings"]["weight"][ROWS]
    expected += ngrams @ params["hash_projection"]["weight"].T
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("width", [None, 256])
def test_initial_tables_weigh_as_in_a_blt(width):
    """A row of the tables, as it is added, has the spread of a row of the embedding."""
    stack = dataclasses.replace(STACK, dim=64)
    tables = HashConfig((2,), 997)
    config = TokenModelConfig(stack, vocab_size=300, hash=tables, hash_dim=width)
    params = functional.init(config, jax.random.key(0))
    rows = np.asarray(params["encoder_hash_tok_embedding"]["weight"][0])
    assert rows.std() == pytest.approx(0.98658 * (width or 64) ** -0.5, rel=0.02)
    if width:
        rows = rows @ np.asarray(params["hash_projection"]["weight"]).T
    assert rows.std() == pytest.approx(0.98658 * 64**-0.5, rel=0.05)


def test_without_sizes_nothing_is_there():
    """And the weights that a seed draws are those that an entropy model has."""
    plain = TokenModelConfig(STACK, vocab_size=300)
    entropy = EntropyModelConfig(STACK, vocab_size=300)
    assert plain.hash.sizes == entropy.hash.sizes == ()
    found, expected = (functional.init(c, jax.random.key(3)) for c in (plain, entropy))
    assert "encoder_hash_tok_embedding" not in found and "hash_projection" not in found
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    tables = functional.init(
        dataclasses.replace(plain, hash=HashConfig((2,), 97)), jax.random.key(3)
    )
    del tables["encoder_hash_tok_embedding"]
    jax.tree.map(np.testing.assert_array_equal, tables, expected)


def test_tables_may_start_at_zero():
    """All other weights are those of the published start."""
    hashing = dataclasses.replace(NARROW.hash, initial_rows="zeros")
    zero = dataclasses.replace(NARROW, hash=hashing)
    normal, found = (functional.init(config, jax.random.key(0)) for config in (NARROW, zero))
    tables = found.pop("encoder_hash_tok_embedding")["weight"]
    assert tables.shape == (4, 997, 8) and not np.any(tables)
    assert np.any(normal.pop("encoder_hash_tok_embedding")["weight"])
    jax.tree.map(np.testing.assert_array_equal, found, normal)
