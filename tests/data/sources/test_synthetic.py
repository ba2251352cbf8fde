"""Drawn text is the same for any reader, makes ordinary records, and has patches to find."""

import json
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.records import store
from bltjax.data.sources import synthetic
from bltjax.data.sources import units as sources

SOURCE = SourceConfig(kind="synthetic")


def documents(data, source=SOURCE, order=None):
    """All documents by name; units are read in any order, as another process gets them."""
    units = sources.list_units(source, data)
    if order is not None:
        order.shuffle(units)
    units = [sources.Unit(**json.loads(json.dumps(unit._asdict()))) for unit in units]
    found = [document for unit in units for document in sources.read_unit(unit, source, data)]
    assert len({document.name for document in found}) == len(found)
    return {document.name: document.data for document in found}


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shard_bytes=st.integers(1, 200_000),
    order=st.randoms(use_true_random=False),
)
def test_documents_depend_on_the_seed_alone(seed, shard_bytes, order):
    data = DataConfig(root="synthetic://", max_bytes=60_000, seed=seed)
    whole = documents(data)
    cut = DataConfig(max_bytes=60_000, seed=seed, shard_bytes=shard_bytes)
    synthetic.language.cache_clear()  # as in another process
    assert documents(cut, order=order) == whole
    other = DataConfig(max_bytes=60_000, seed=seed ^ 1)
    assert not set(documents(other).values()) & set(whole.values())


def test_sources_of_other_names_have_other_words():
    data = DataConfig(max_bytes=20_000)
    ours, theirs = (documents(data, SourceConfig(n, kind="synthetic")) for n in ("text", "b"))
    assert ours.keys() == theirs.keys() and not set(ours.values()) & set(theirs.values())


@pytest.mark.parametrize("max_bytes", [1, 3000, 100_000, 1_000_000])
def test_its_size_is_near_what_is_asked_for(max_bytes):
    found = documents(DataConfig(max_bytes=max_bytes))
    size = sum(map(len, found.values()))
    assert found and abs(size - max_bytes) <= max(2 * synthetic.MEAN_BYTES, 0.05 * max_bytes)
    larger = documents(DataConfig(max_bytes=2 * max_bytes))
    assert found.items() <= larger.items()
    assert sum(u.size for u in sources.list_units(SOURCE, DataConfig())) == pytest.approx(
        synthetic.DEFAULT_BYTES, rel=1e-3
    )


def nats(texts, context):
    """Nats of each next letter of a word after its first `context` letters, by counting."""
    counts = {}
    for text in texts:
        for word in text.split():
            counts.setdefault(word[:context], Counter())[(word + " ")[context : context + 1]] += 1
    total = sum(sum(of.values()) for of in counts.values())
    return (
        -sum(n * math.log(n / sum(of.values())) for of in counts.values() for n in of.values())
        / total
    )


def test_the_next_letter_is_hardest_where_a_word_begins():
    data = DataConfig(max_bytes=400_000)
    texts = [text.decode() for text in documents(data).values()]
    hard, *easier = (nats(texts, context) for context in (0, 2, 4))
    assert hard > 2 and all(value < hard / 2 for value in easier), (hard, easier)
    words = Counter(word.strip(".,").lower() for text in texts for word in text.split())
    (_, first), *_ = words.most_common(1)
    assert 0.03 < first / words.total() < 0.12
    assert len(words) > 1000
    mean = sum(len(word) * count for word, count in words.items()) / words.total()
    assert 3 < mean < 0.8 * sum(map(len, words)) / len(words)


def test_records_are_made_of_it_and_held_out(tmp_path):
    data = DataConfig(root="synthetic://", max_bytes=200_000, shard_bytes=50_000)
    made = store.build(tmp_path / "records", data)
    assert made.documents("train") and made.documents("validation")
    stored = {document.name: document.data for part in store.PARTS for document in of(made, part)}
    assert stored == documents(data)
    for path in random.Random(0).sample(sorted((tmp_path / "records/text").glob("*.json")), 2):
        path.unlink()  # as a process leaves it that is killed
    assert store.build(tmp_path / "records", data).digest() == made.digest()
    with pytest.raises(ValueError, match=r"data\.seed: 0 there, 1 here"):
        store.build(
            tmp_path / "records", DataConfig(root="synthetic://", max_bytes=200_000, seed=1)
        )


def of(made, part):
    return list(store.Documents(made.shards(part=part), entropies=False))
