"""Batches hold every byte of the corpus once an epoch, whoever makes them, wherever they begin."""

import collections
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.config import PatchingConfig
from bltjax.data.batches.lanes import Lane, Layout
from bltjax.data.batches.loader import as_batch, batches, whole_batches
from bltjax.data.batches.order import BLOCK, SMALL, Mixture, Shuffled, shuffled_place
from bltjax.data.batches.packing import MIN_OPEN, POOL_BYTES
from bltjax.data.batches.rows import Row, utilisation
from bltjax.data.sources.units import Document
from bltjax.patching.boundaries import patch_starts
from bltjax.vocabulary import PAD_ID, encode

ENTROPY = PatchingConfig(threshold=1.0)
SPACE = PatchingConfig(rule="space")


def document(data: bytes, seed: int = 0) -> Document:
    entropies = np.random.default_rng(seed).gamma(1.0, 1.0, len(data) + 2)
    return Document("", data, "", entropies.astype(np.float16))


def corpus(num_documents: int = 40, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    sizes = rng.geometric(0.01, num_documents)
    return [document(rng.bytes(n), i) for i, n in enumerate(sizes)]


def each_its_own_source(documents):
    """So that a row's source_ids say which document a byte belongs to."""
    return [[d] for d in documents]


def pieces(rows):
    """(document, ids, patch starts) of what each row holds, in order."""
    for row in rows:
        num_real = np.count_nonzero(row.tokens != PAD_ID)
        starts = np.zeros(len(row.tokens) + 2, bool)
        starts[np.cumsum(row.patch_lengths)[:-1]] = starts[0] = True
        for number in np.unique(row.document_ids[:num_real]):
            where = np.flatnonzero(row.document_ids[:num_real] == number)
            assert (np.diff(where) == 1).all()
            begin, end = where[0], where[-1] + 1
            (source,) = np.unique(row.source_ids[begin:end])
            yield int(source), row.tokens[begin:end], starts[begin:end], begin == 0


def check_epoch(rows, documents, patching):
    """Every document's ids once, in order, and its patches, but for the allowed splits."""
    taken = [0] * len(documents)
    for number, ids, starts, first_in_row in pieces(rows):
        expected = encode(documents[number].data)
        begin, taken[number] = taken[number], taken[number] + len(ids)
        np.testing.assert_array_equal(ids, expected[begin : taken[number]])
        wanted = patch_starts(patching, expected, documents[number].entropies)
        wanted = wanted[begin : taken[number]].copy()
        wanted[0] = True  # a piece begins where a patch does, or where one of a row's length is cut
        if first_in_row:
            wanted[1:2] = True
        np.testing.assert_array_equal(starts, wanted)
    assert taken == [len(d.data) + 2 for d in documents]


blobs = st.one_of(st.binary(max_size=80), st.integers(0, 400).map(bytes), st.just(b"\xff\xc0\n"))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(blobs, min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from([1, 2, 5, 32]),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([(64, 16), (64, 64), (40, 3), (200, 30)]),
    st.sampled_from([ENTROPY, SPACE, PatchingConfig(threshold=9.0)]),
)
def test_an_epoch_is_the_corpus(data, num_lanes, pool, slack, budgets, patching):
    documents = [document(d, i) for i, d in enumerate(data)]
    order = Shuffled(each_its_own_source(documents), seed=1, endless=False)
    layout = Layout(*budgets, patching, pool, slack)
    for row in (rows := list(rows_of(order, layout, num_lanes))):
        assert row.patch_lengths.sum() == layout.row_bytes + 1 and row.patch_lengths[0] == 1
    check_epoch(rows, documents, patching)


def rows_of(order, layout, num_lanes):
    for lane in range(num_lanes):
        yield from Lane(order, layout, lane, num_lanes)


@pytest.mark.long
def test_a_document_of_100_mb_goes_through():
    size = 100_000_000
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    big = Document("", data.tobytes())
    layout = Layout(262_144, 65_792, PatchingConfig(rule="static", patch_size=4))
    order = Shuffled([[big], [Document("", b"small")]], seed=0, endless=False)
    reached = 0
    for source, ids, *_ in pieces(rows_of(order, layout, 1)):
        if source == 0:
            inner = ids[ids >= 4] - 4
            assert (inner == data[reached : reached + len(inner)]).all()
            reached += len(inner)
    assert reached == size


def test_balanced_rows_waste_little_where_documents_differ():
    rng = np.random.default_rng(0)
    documents = []
    for i in range(400):  # of 3 and of 9 bytes a patch
        ids = int(rng.integers(50, 3000))
        entropies = (rng.random(ids + 2) < (1 / 3 if i % 2 else 1 / 9)) * 2.0
        documents.append(Document("", bytes(ids), "", entropies.astype(np.float16)))
    order = Shuffled([documents], seed=0)
    layouts = [Layout(2048, 458, ENTROPY, pool, slack=0.02) for pool in (1, 32)]
    fifo, balanced = (
        utilisation(itertools.islice(rows_of(order, layout, 1), 300)) for layout in layouts
    )
    assert balanced["byte_utilisation"] > 0.96 and balanced["patch_utilisation"] > 0.96
    assert fifo["byte_utilisation"] < 0.93 and fifo["patch_utilisation"] < 0.93


def flat(batch):
    return {name: value.copy() for name, value in batch._asdict().items()}


def assert_same(batch, expected, rows=slice(None)):
    for name, value in batch._asdict().items():
        np.testing.assert_array_equal(value, expected[name][rows], err_msg=name)


LAYOUT = Layout(128, 24, ENTROPY, pool=4)


@pytest.fixture(scope="module")
def uninterrupted():
    order = Shuffled([corpus()], seed=3)
    stream = batches(order, LAYOUT, 4)
    return [(flat(batch), states) for batch, states in (next(stream) for _ in range(60))]


@pytest.mark.parametrize("attempt", range(3))
def test_a_stream_goes_on_from_any_batch(uninterrupted, attempt):
    at = random.Random().randrange(48)
    print("after batch", at)
    states = np.array(json.loads(json.dumps(uninterrupted[at][1].tolist())))
    stream = batches(Shuffled([corpus()], seed=3), LAYOUT, 4, states)
    for expected, expected_states in uninterrupted[at + 1 : at + 12]:
        batch, states = next(stream)
        assert_same(batch, expected)
        np.testing.assert_array_equal(states, expected_states)


def test_worker_processes_change_nothing(uninterrupted):
    order, states = Shuffled([corpus()], seed=3), uninterrupted[4][1]
    stream = batches(order, LAYOUT, 4, states, workers=2)
    for expected, expected_states in uninterrupted[5:15]:
        batch, states = next(stream)
        assert_same(batch, expected)
        np.testing.assert_array_equal(states, expected_states)


PROCESS = """
import json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from tests.data.batches import test_loader as t
rows, num_batches, state_file, out = range(*json.loads(sys.argv[2])), *sys.argv[3:]
states = np.load(state_file) if state_file else None
stream = t.batches(t.Shuffled([t.corpus()], seed=3), t.LAYOUT, 4, states, rows)
found = [next(stream) for _ in range(int(num_batches))]
stream.close()
np.savez(out, states=found[-1][1], **{f"{i}.{k}": v for i, (b, _) in enumerate(found)
                                      for k, v in b._asdict().items()})
"""


@pytest.mark.long
def test_one_two_and_four_processes_make_the_same_batches(uninterrupted, tmp_path):
    root, states, done = Path(__file__).parents[3], None, 0
    lengths = [random.Random().randrange(1, 20) for _ in range(3)]
    print("batches of one, two and four processes:", lengths)
    for num_processes, num_batches in zip((1, 2, 4), lengths, strict=True):
        share, processes, outs = 4 // num_processes, [], []
        for p in range(num_processes):
            given_states = ""
            if states is not None:
                given_states = str(tmp_path / f"states{num_processes}-{p}.npy")
                np.save(given_states, states[p * share : (p + 1) * share])
            outs.append(tmp_path / f"out{num_processes}-{p}.npz")
            arguments = [json.dumps([p * share, (p + 1) * share]), num_batches, given_states]
            command = [sys.executable, "-c", PROCESS, root, *arguments, outs[-1]]
            processes.append(subprocess.Popen([str(c) for c in command], cwd=root))
        assert [p.wait() for p in processes] == [0] * num_processes
        found = [np.load(out) for out in outs]
        for i in range(num_batches):
            for name in Row._fields:
                value = np.concatenate([f[f"{i}.{name}"] for f in found])
                np.testing.assert_array_equal(value, uninterrupted[done + i][0][name])
        states = np.concatenate([f["states"] for f in found])
        done += num_batches


def test_large_corpora_are_permuted_too():
    size = SMALL + 1
    found = [shuffled_place(place, size, seed=5) for place in range(size - 300, size + 300)]
    assert len(set(found[:300])) == len(set(found[300:])) == 300
    assert min(found) >= 0 and max(found) < size
    assert sum(a < size // 2 for a in found) in range(240, 360)


def test_orders_differ_between_epochs_and_seeds():
    documents = [Document(str(i), b"") for i in range(50)]

    def names(seed, epoch):
        order = Shuffled([documents[:20], documents[20:]], seed)
        return [int(order[i][1].name) for i in range(50 * epoch, 50 * epoch + 50)]

    orders = [names(0, 0), names(0, 1), names(1, 0)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[0] == names(0, 0)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4), st.integers(0, 9))
def test_a_mixture_gives_each_source_its_share_of_the_bytes(weights, seed):
    sizes = [10 * 4**i for i in range(len(weights))]
    sources = [[Document(str(i), bytes(n)) for i in range(30 + n % 7)] for n in sizes]
    mixture = Mixture(sources, weights, sizes, seed)
    read, places = [0] * len(weights), 2 * BLOCK
    for place in range(places):
        source, d = mixture[place]
        read[source] += len(d.data)
    shares = np.array(read) / sum(read)
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), rtol=0.15)


def test_a_source_of_few_large_documents_gets_its_share():
    mixture = Mixture([[], []], [0.9, 0.1], [1e3, 1e6], seed=0)
    sizes = mixture.counts * (1e3, 1e6)
    np.testing.assert_allclose(sizes / sizes.sum(), [0.9, 0.1], rtol=0.02)
    slots = [shuffled_place(place, mixture.block, 0) for place in range(2000)]
    assert len(set(slots)) == 2000 and max(slots) < mixture.block


@pytest.mark.parametrize("num_lanes", [2, 4, 64])
def test_every_lane_meets_the_mixture(num_lanes):
    sources = [[Document("", bytes(n))] for n in (300, 900)]
    mixture = Mixture(sources, [0.5, 0.5], [300, 900], seed=0)
    of_first = []
    for lane in range(num_lanes):
        places = range(lane, lane + 400 * num_lanes, num_lanes)
        of_first.append(np.mean([mixture[place][0] == 0 for place in places]))
    assert abs(np.mean(of_first) - 0.75) < 0.02  # three small documents for a large one
    assert min(of_first) > 0.6 and max(of_first) < 0.9


def test_large_documents_are_not_all_open_at_once():
    documents = [Document(str(i), bytes(POOL_BYTES // 2)) for i in range(9)]
    lane = Lane(Shuffled([documents], seed=0), LAYOUT._replace(pool=8, patching=SPACE), 0, 1)
    next(lane)
    assert len(lane.packer.open) == MIN_OPEN
    again = Lane(Shuffled([documents], seed=0), lane.layout, 0, 1, lane.state)
    for _ in range(3):
        np.testing.assert_array_equal(next(lane).patch_lengths, next(again).patch_lengths)
    assert (lane.state == again.state).all()


def test_a_mixture_reads_each_source_whole_before_it_repeats():
    sources = [[Document(f"{s}{i}", b"x") for i in range(n)] for s, n in (("a", 5), ("b", 700))]
    mixture = Mixture(sources, [1.0, 3.0], [1, 1], seed=0)
    seen = [collections.Counter(), collections.Counter()]
    for place in range(mixture.block):
        source, d = mixture[place]
        seen[source][d.name] += 1
    for times, documents in zip(seen, sources, strict=True):
        assert len(times) == len(documents) and max(times.values()) - min(times.values()) <= 1
    assert mixture.block == BLOCK and seen[0].total() == BLOCK // 4


def test_whole_batches_end_with_rows_that_count_nothing():
    order = Shuffled([corpus(7)], seed=0, endless=False)
    rows = list(rows_of(order, LAYOUT, 1))
    size = len(rows) - 1
    first, second = whole_batches(iter(rows), size)
    assert first.tokens.shape == (size, 128) and second.tokens.shape == (size, 128)
    np.testing.assert_array_equal(second.tokens[0], rows[-1].tokens)
    assert second.loss_mask[0].any() and not second.loss_mask[1:].any()
    assert {"source_ids", "patch_lengths"} & set(as_batch(first)) == {"patch_lengths"}
