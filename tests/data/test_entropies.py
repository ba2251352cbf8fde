"""Entropies of a corpus: the same however documents are cut into windows, stored and resumed."""

import jax
import numpy as np
import pytest

from bltjax.config import EntropyModelConfig, TransformerConfig
from bltjax.data import entropies as module
from bltjax.data.entropies import (
    corpus_entropies,
    make_entropy_fn,
    receptive_bytes,
    stored_entropies,
)
from bltjax.model import functional
from bltjax.vocabulary import encode

CONFIG = EntropyModelConfig(
    transformer=TransformerConfig(
        dim=16, num_layers=2, num_heads=2, window=5, ffn_multiple_of=8, rope_theta=10_000.0
    )
)


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(0)
    return [encode(random.bytes(n)) for n in (0, 1, 6, 14, 15, 16, 40, 200)]


def test_windows_give_what_a_pass_over_the_whole_document_gives(documents):
    params = functional.init(CONFIG, jax.random.key(0))
    entropy_fn = make_entropy_fn(CONFIG)
    assert receptive_bytes(CONFIG) == 8
    found = corpus_entropies(entropy_fn, params, CONFIG, documents, row_bytes=16, batch_size=3)
    assert entropy_fn._cache_size() == 1
    longest = max(map(len, documents))
    padded = np.stack([np.pad(ids, (0, longest - len(ids))) for ids in documents])
    whole = np.asarray(entropy_fn(params, padded))
    for ids, got, expected in zip(documents, found, whole, strict=True):
        assert got.dtype == np.float32 and got.shape == ids.shape
        np.testing.assert_allclose(got, expected[: len(ids)], atol=1e-5)


def test_rows_shorter_than_the_receptive_field_are_refused(documents):
    with pytest.raises(ValueError, match="202 ids: the model looks back 8 bytes, use at least 16"):
        corpus_entropies(None, None, CONFIG, documents, row_bytes=15, batch_size=3)


def test_rows_may_be_short_where_every_document_fits():
    params, entropy_fn = functional.init(CONFIG, jax.random.key(0)), make_entropy_fn(CONFIG)
    ids = encode(b"twelve bytes")
    (found,) = corpus_entropies(entropy_fn, params, CONFIG, [ids], row_bytes=14, batch_size=1)
    np.testing.assert_allclose(found, np.asarray(entropy_fn(params, ids[None]))[0], atol=1e-6)
    with pytest.raises(ValueError, match="use at least 14"):
        corpus_entropies(entropy_fn, params, CONFIG, [ids], row_bytes=13, batch_size=1)
    assert corpus_entropies(entropy_fn, params, CONFIG, [], row_bytes=1, batch_size=1) == []


def test_newline_reset_forgets_what_stood_before_the_newline():
    params = functional.init(CONFIG, jax.random.key(0))
    entropy_fn = make_entropy_fn(CONFIG, reset_at_newlines=True)
    one, other = (encode(text)[None] for text in ("abc\nxyz", "ABC\nxyz"))
    one, other = (np.asarray(entropy_fn(params, tokens))[0] for tokens in (one, other))
    newline = 4  # BOS a b c \n
    assert (one[: newline + 1] != other[: newline + 1])[1:].all()
    np.testing.assert_array_equal(one[newline + 1 :], other[newline + 1 :])


def test_stored_shards_are_read_and_missing_ones_computed(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 20)
    computed = []

    def compute(shard):
        computed.extend(len(ids) for ids in shard)
        return [ids.astype(np.float32) for ids in shard]

    first = stored_entropies(tmp_path / "e", "train", documents, compute)
    assert computed == [len(ids) for ids in documents]
    shards = sorted((tmp_path / "e").iterdir())
    assert len(shards) > 2
    shards[1].unlink()
    computed.clear()
    again = stored_entropies(tmp_path / "e", "train", documents, compute)
    assert 0 < len(computed) < len(documents)
    for ids, a, b in zip(documents, first, again, strict=True):
        np.testing.assert_array_equal(a, ids.astype(np.float32))
        np.testing.assert_array_equal(a, b)


def test_a_damaged_or_foreign_shard_is_named(documents, tmp_path):
    def compute(shard):
        return [ids.astype(np.float32) for ids in shard]

    directory = tmp_path / "e"
    stored_entropies(directory, "train", documents, compute)
    with pytest.raises(ValueError, match=r"train-00000\.npy holds .* the corpus has changed"):
        stored_entropies(directory, "train", documents[:-1], compute)
    path = directory / "train-00000.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"train-00000\.npy cannot be read"):
        stored_entropies(directory, "train", documents, compute)
