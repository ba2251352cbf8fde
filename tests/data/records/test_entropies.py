"""Entropies of a corpus: the same however documents share rows, are cut, stored and resumed."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bltjax.config import EntropyModelConfig, TransformerConfig
from bltjax.config.data import DataConfig
from bltjax.data.records import entropies as module
from bltjax.data.records import store as records
from bltjax.data.records.entropies import (
    add_entropies,
    corpus_entropies,
    make_entropy_fn,
    receptive_bytes,
)
from bltjax.model import functional
from bltjax.runtime import progress
from bltjax.vocabulary import EOS_ID, PAD_ID, decode, encode

CONFIG = EntropyModelConfig(
    transformer=TransformerConfig(
        dim=16, num_layers=2, num_heads=2, window=5, ffn_multiple_of=8, rope_theta=10_000.0
    )
)
LONGEST = 200
SHAPE = dict(row_bytes=32, batch_size=2)


cached_entropy_fn = functools.cache(make_entropy_fn)


@functools.cache
def params():
    return functional.init(CONFIG, jax.random.key(0))


def document(length, seed, add_eos=True):
    letters = np.frombuffer(b"abcdefghij\n \xc3\xa9", np.uint8)
    random = np.random.default_rng(seed)
    return encode(random.choice(letters, length).tobytes(), add_eos=add_eos)


def entropies_of_whole(entropy_fn, ids):
    """One document a call, in a row of its own."""
    padded = np.pad(ids, (0, LONGEST + 2 - len(ids)))[None]
    return np.asarray(entropy_fn(params(), padded))[0, : len(ids)]


def copied(params, tokens):
    """Instead of a model: the ids themselves."""
    return tokens.astype(np.float32)


def test_receptive_bytes():
    assert receptive_bytes(CONFIG) == 8


@pytest.mark.parametrize("reset_at_newlines", [False, True])
@settings(max_examples=15)
@example(lengths=[200, 0, 1, 14, 15, 29, 30, 31, 62], with_eos=True, share_rows=True)
@example(lengths=[33, 3, 3, 40, 3], with_eos=False, share_rows=True)
@given(
    lengths=st.lists(st.integers(0, LONGEST), max_size=9),
    with_eos=st.booleans(),
    share_rows=st.booleans(),
)
def test_shared_rows_give_what_a_pass_over_the_whole_document_gives(
    reset_at_newlines, lengths, with_eos, share_rows
):
    """Of documents that end and of beginnings of documents, which need an EOS in between."""
    entropy_fn = cached_entropy_fn(CONFIG, reset_at_newlines)
    documents = [document(n, seed, with_eos) for seed, n in enumerate(lengths)]
    found = corpus_entropies(
        entropy_fn, params(), CONFIG, documents, **SHAPE, share_rows=share_rows
    )
    assert len(found) == len(documents)
    for ids, got in zip(documents, found, strict=True):
        assert got.dtype == np.float32 and got.shape == ids.shape
        expected = entropies_of_whole(entropy_fn, ids)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert entropy_fn._cache_size() <= 2  # the one shape, and that of the comparison


def test_the_same_list_gives_the_same_bits():
    entropy_fn = cached_entropy_fn(CONFIG)
    documents = [document(n, n) for n in (100, 3, 20, 7, 20)]
    one, two = (
        corpus_entropies(entropy_fn, params(), CONFIG, documents, **SHAPE, share_rows=True)
        for _ in range(2)
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_sharing_company_changes_no_bit():
    entropy_fn = cached_entropy_fn(CONFIG)
    documents = [document(n, n) for n in (100, 3, 20, 7, 20)]
    found = corpus_entropies(entropy_fn, params(), CONFIG, documents, **SHAPE)
    for ids, expected in zip(documents, found, strict=True):
        (alone,) = corpus_entropies(entropy_fn, params(), CONFIG, [ids], **SHAPE)
        np.testing.assert_array_equal(alone, expected)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=30),
    with_eos=st.booleans(),
    row_bytes=st.integers(16, 40),
    batch_size=st.integers(1, 4),
)
def test_spans_stand_apart_in_rows(lengths, with_eos, row_bytes, batch_size):
    documents = [document(n, seed, with_eos) for seed, n in enumerate(lengths)]
    batches = []

    def remembered(params, tokens):
        batches.append(np.asarray(tokens))
        return copied(params, tokens)

    found = corpus_entropies(
        remembered, None, CONFIG, documents, row_bytes, batch_size, share_rows=True
    )
    for ids, got in zip(documents, found, strict=True):
        np.testing.assert_array_equal(got, ids)
    assert {batch.shape for batch in batches} == {(batch_size, row_bytes)}
    for row in np.concatenate(batches):
        used = row[: np.max(np.flatnonzero(row != PAD_ID), initial=-1) + 1]
        assert (used != PAD_ID).all()
        for context in np.split(used, np.flatnonzero(used == EOS_ID) + 1):
            context = context[context != EOS_ID].astype(np.uint8).tobytes()
            assert any(context in ids.astype(np.uint8).tobytes() for ids in documents)


@pytest.mark.parametrize("mean, share", [(50, 0.99), (500, 0.98), (5000, 0.95), (100_000, 0.93)])
def test_rows_are_full(mean, share):
    """Share of positions that hold an id whose entropy is kept, in rows of 4096 positions."""
    sizes = np.random.default_rng(0).lognormal(np.log(mean), 0.8, 400_000 // mean + 5)
    documents, rows = [encode(bytes(int(n))) for n in sizes], 0

    def counted(params, tokens):
        nonlocal rows
        rows += len(tokens)
        return copied(params, tokens)

    corpus_entropies(counted, None, CONFIG, documents, 4096, 1, share_rows=True)
    assert sum(map(len, documents)) >= share * rows * 4096


def test_fewest_rows():
    rows = []

    def counted(params, tokens):
        rows.extend(tokens)
        return copied(params, tokens)

    # A continued document repeats no more than what is looked back on: 16 + 4 * 8 ids.
    corpus_entropies(counted, None, CONFIG, [encode(bytes(46))], 16, 1, share_rows=True)
    assert len(rows) == 5
    rows.clear()
    documents = [encode(bytes(n - 2)) for n in (4, 10, 4, 8, 6)]
    corpus_entropies(counted, None, CONFIG, documents, 16, 1, share_rows=True)
    assert len(rows) == 2


def test_rows_shorter_than_the_receptive_field_are_refused():
    with pytest.raises(ValueError, match="202 ids: the model looks back 8 bytes, use at least 16"):
        corpus_entropies(None, None, CONFIG, [document(200, 0)], row_bytes=15, batch_size=3)


@pytest.mark.parametrize("share_rows", [False, True])
def test_rows_may_be_short_where_every_document_fits(share_rows):
    ids = encode(b"twelve bytes")
    for documents in ([ids], []):
        found = corpus_entropies(copied, None, CONFIG, documents, 14, 1, share_rows)
        assert len(found) == len(documents)
    with pytest.raises(ValueError, match="use at least 14"):
        corpus_entropies(copied, None, CONFIG, [ids], 13, 1, share_rows)


def test_newline_reset_forgets_what_stood_before_the_newline():
    entropy_fn = cached_entropy_fn(CONFIG, True)
    one, other = (entropies_of_whole(entropy_fn, encode(x)) for x in ("abc\nxyz", "ABC\nxyz"))
    newline = 4  # BOS a b c \n
    assert (one[: newline + 1] != other[: newline + 1])[1:].all()
    np.testing.assert_array_equal(one[newline + 1 :], other[newline + 1 :])


@pytest.fixture
def build(tmp_path):
    """`build(name)` makes a store of 3 shards; the documents are the same each time."""
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(24):
        text = document(20 + 7 * i, i)
        (root / f"{i:02}.txt").write_bytes(decode(text))

    def make(name):
        data = DataConfig(root=str(root), shard_bytes=1000, validation_fraction=0.01)
        store = records.build(tmp_path / name, data)
        assert len(store.shards()) == 3
        return store

    return make


def entropy_files(store):
    paths = [p for s in store.shards() for p in (s.entropies_path, s.scores_path)]
    return [path.read_bytes() for path in paths]


def test_an_interrupted_store_goes_on_and_ends_the_same(build, monkeypatch):
    entropy_fn = cached_entropy_fn(CONFIG)
    monkeypatch.setattr(module, "GROUP_IDS", 300)
    whole, interrupted = build("whole"), build("interrupted")
    add_entropies(whole, whole.shards(), entropy_fn, params(), CONFIG, **SHAPE)
    first, *rest = interrupted.shards()
    calls = []

    def failing(params, tokens):
        calls.extend([tokens] * records.has_entropies(first))
        if len(calls) > 10:  # in the midst of the second shard
            raise KeyboardInterrupt
        return entropy_fn(params, tokens)

    with pytest.raises(KeyboardInterrupt):
        add_entropies(interrupted, [first, *rest], failing, params(), CONFIG, **SHAPE)
    assert [records.has_entropies(s) for s in [first, *rest]] == [True, False, False]
    written, write = [], module.write_entropies

    def recorded(shard, *given):
        written.append(shard)
        write(shard, *given)

    monkeypatch.setattr(module, "write_entropies", recorded)
    for _ in range(2):
        add_entropies(interrupted, [first, *rest], entropy_fn, params(), CONFIG, **SHAPE)
    assert written == rest
    assert entropy_files(interrupted) == entropy_files(whole)


def test_stored_entropies_are_those_of_the_documents(build, monkeypatch):
    store, groups = build("store"), []
    monkeypatch.setattr(module, "GROUP_IDS", 300)

    def recorded(*args, **kwargs):
        groups.append([len(ids) for ids in args[3]])
        return corpus_entropies(*args, **kwargs)

    monkeypatch.setattr(module, "corpus_entropies", recorded)
    entropy_fn = cached_entropy_fn(CONFIG)
    add_entropies(store, store.shards(), entropy_fn, params(), CONFIG, **SHAPE)
    documents = records.Documents(store.shards(), entropies=True)
    ids = [encode(documents[i].data) for i in range(len(documents))]
    assert list(itertools.chain(*groups)) == [len(i) for i in ids]
    assert len(groups) > 2 * 3 and all(sum(group[:-1]) < 300 for group in groups)
    expected = corpus_entropies(entropy_fn, params(), CONFIG, ids, **SHAPE)
    for i, values in enumerate(expected):
        assert documents[i].entropies.dtype == np.float16
        np.testing.assert_allclose(documents[i].entropies, values, rtol=1e-3, atol=1e-5)
    (histogram,) = records.score_histogram(store.shards()).values()
    assert histogram.num_positions == sum(map(len, ids))


def test_short_documents_of_a_store_share_rows_and_progress_is_shown(build, monkeypatch, capsys):
    store, rows = build("store"), []

    def counted(params, tokens):
        rows.extend(tokens)
        return np.ones(tokens.shape, np.float32)

    first, second, third = store.shards()
    records.write_entropies(second, [np.ones(n) for n in lengths_of(second)])  # by another process
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    add_entropies(store, store.shards(), counted, None, CONFIG, row_bytes=1024, batch_size=1)
    assert len(rows) < len(lengths_of(first) + lengths_of(third)) / 2
    share = 100 * first.num_bytes / (first.num_bytes + third.num_bytes)
    lines = [line for line in capsys.readouterr().err.splitlines() if "entropies" in line]
    assert [line.split("%")[0].split()[-1] for line in lines[1:3]] == [f"{share:.0f}", "100"]


def lengths_of(shard):
    documents = records.Documents([shard])
    return [len(documents[i].data) + 2 for i in range(len(documents))]
