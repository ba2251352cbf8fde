"""The published pipeline's numbers, bit for bit, and what holds for every row it makes."""

import itertools
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import published_rows
from bltjax.config import DataConfig, PatchingConfig
from bltjax.data.records import store as records
from tests import golden

BYTES = PatchingConfig(rule="byte")


def stored_documents():
    with pa.OSFile(str(golden.GOLDEN / "toy.chunk.00.jsonl.shard_00.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    texts = table["text"].to_pylist()
    entropies = [np.array(list_, np.float16) for list_ in table["entropies"].to_pylist()]
    return list(zip(texts, entropies, strict=True))


def golden_sequences(seq_len, patching=PatchingConfig(), **options):
    documents = [published_rows.patch_document(*stored, patching) for stored in stored_documents()]
    return published_rows.patch_sequences(itertools.cycle(documents), seq_len, **options)


def assert_golden(batch, name):
    fields = ("x", "y", "mask", "patch_lengths") if batch.patch_lengths.size else ("x", "y", "mask")
    for field in fields:
        expected = golden.arrays("meta_data_pipeline")[f"{name}_{field}"]
        np.testing.assert_array_equal(getattr(batch, field), expected)


def test_documents_are_the_published_ones():
    expected = golden.arrays("meta_data_pipeline")
    stored = stored_documents()
    assert len(stored) == 6
    for number, (text, entropies) in enumerate(stored):
        np.testing.assert_array_equal(entropies, expected[f"doc{number}_entropies_f16"])
        ids, lengths = published_rows.patch_document(text, entropies)
        np.testing.assert_array_equal(ids, expected[f"doc{number}_tokens"])
        np.testing.assert_array_equal(lengths, expected[f"doc{number}_patch_lengths"])


def test_the_published_documents_go_through_our_records(tmp_path):
    (tmp_path / "toy").mkdir()
    name = "toy.chunk.00.jsonl.shard_00.arrow"
    shutil.copy(golden.GOLDEN / name, tmp_path / "toy" / name)
    (tmp_path / "toy" / f"{name}.complete").touch()
    data = DataConfig(root=str(tmp_path / "toy"), validation_fraction=0.4)
    expected = golden.arrays("meta_data_pipeline")
    store = records.build(tmp_path / "records", data)
    found = {}
    for part in records.PARTS:
        shards = store.shards(part=part)
        assert all(records.has_entropies(shard) for shard in shards)
        documents = records.Documents(shards, entropies=True)
        found |= {documents[i].data: documents[i] for i in range(len(documents))}
    assert len(found) == 6
    for i in range(6):
        document = found[expected[f"doc{i}_text"].tobytes()]
        np.testing.assert_array_equal(document.entropies, expected[f"doc{i}_entropies_f16"])
        ids, lengths = published_rows.patch_document(document.data, document.entropies)
        np.testing.assert_array_equal(ids, expected[f"doc{i}_tokens"])
        np.testing.assert_array_equal(lengths, expected[f"doc{i}_patch_lengths"])


@pytest.mark.parametrize(
    "name, max_bytes, pad, buffer_size, seed",
    [
        ("noshuffle_pad", 40, True, 1, None),
        ("noshuffle_trunc", 16, False, 1, None),
        ("noshuffle_trunc", 16, True, 3, None),
        ("shuffle_seed42_rank0_ws1", 40, True, 4, 42),
    ],
)
def test_batches_are_the_published_ones(name, max_bytes, pad, buffer_size, seed):
    rng = None if seed is None else published_rows.shuffle_rng(seed, rank=0, world=1)
    sequences = golden_sequences(8, buffer_size=buffer_size, rng=rng)
    for number in range(3):
        batch = published_rows.pack_sequences(itertools.islice(sequences, 2), max_bytes, pad)
        assert_golden(batch, f"{name}_b{number}")


def test_byte_batch_is_the_published_one():
    sequences = golden_sequences(16, BYTES)
    batch = published_rows.pack_byte_sequences(itertools.islice(sequences, 2))
    assert_golden(batch, "bytes16_b0")
    assert batch.patch_lengths.shape == (2, 0)
    assert (batch.lost, batch.padding) == (0, 0)


def test_lost_and_padding_by_hand():
    # 12 ids in patches of 2, 3, 4 and 3: the first is split, so the last is dropped.
    split = (np.arange(1, 13), np.array([2, 3, 4, 3]))
    short = (np.arange(1, 5), np.array([1, 1, 1, 1]))
    batch = published_rows.pack_sequences([split, short], max_bytes=10)
    assert batch.patch_lengths.tolist() == [[1, 1, 3, 6], [1, 1, 1, 8]]
    assert (batch.lost, batch.padding) == (3, 2 + 7)
    batch = published_rows.pack_sequences([split, short], max_bytes=3)
    assert batch.patch_lengths.tolist() == [[1, 1, 2, 0], [1, 1, 1, 1]]
    assert (batch.x.tolist(), batch.y.tolist()) == ([[1, 2, 3]] * 2, [[2, 3, 4]] * 2)
    assert (batch.lost, batch.padding) == (8, 0)


@st.composite
def streams(draw):
    """Documents of several patches, numbered ids, and a number of patches a sequence."""
    numbers = itertools.count(1)
    documents = []
    for _ in range(draw(st.integers(1, 8))):
        lengths = np.array([1, *draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))])
        documents.append((np.fromiter(itertools.islice(numbers, lengths.sum()), int), lengths))
    return documents, draw(st.integers(2, 5))


@given(streams(), st.integers(1, 3))
def test_sequences_are_the_stream_in_pieces(stream, buffer_size):
    documents, seq_len = stream
    ids, lengths = map(np.concatenate, zip(*documents, strict=True))
    sequences = list(published_rows.patch_sequences(documents, seq_len, buffer_size))
    assert len(sequences) == len(lengths) // (seq_len * buffer_size) * buffer_size
    for number, (found, patches) in enumerate(sequences):
        assert patches.tolist() == lengths[number * seq_len : (number + 1) * seq_len].tolist()
        start = lengths[: number * seq_len].sum()
        assert found.tolist() == ids[start : start + patches.sum()].tolist()


@given(streams(), st.integers(1, 3), st.integers(0, 9), st.integers(0, 3))
def test_shuffles_move_sequences_within_their_buffer(stream, buffer_size, seed, rank):
    documents, seq_len = stream

    def sequences(**options):
        found = published_rows.patch_sequences(documents, seq_len, buffer_size, **options)
        return [tuple(ids.tolist()) for ids, _ in found]

    def rng():
        return published_rows.shuffle_rng(seed, rank, world=4)

    plain, shuffled = sequences(), sequences(rng=rng())
    assert shuffled == sequences(rng=rng())
    expected, random = [], rng()
    for start in range(0, len(plain), buffer_size):
        expected += [plain[start + i] for i in random.permutation(buffer_size)]
    assert shuffled == expected


@given(streams(), st.integers(2, 40), st.integers(1, 5), st.integers(0, 2))
def test_every_row_keeps_the_rules_of_the_published_batch(stream, max_bytes, count, missing):
    sequences = list(itertools.islice(published_rows.patch_sequences(*stream), count))
    if not sequences:
        return
    batch_size, seq_len = len(sequences) + missing, stream[1]
    batch = published_rows.pack_sequences(sequences, max_bytes, batch_size=batch_size)
    for filling in batch.patch_lengths[len(sequences) :]:
        np.testing.assert_array_equal(filling, batch.patch_lengths[len(sequences) - 1])
    assert batch.x.shape == batch.y.shape == batch.mask.shape == (batch_size, max_bytes)
    assert batch.patch_lengths.shape == (batch_size, seq_len)
    assert batch.patch_lengths.dtype == batch.x.dtype == batch.y.dtype == np.int32
    assert (batch.patch_lengths[:, 0] == 1).all()
    assert (batch.patch_lengths.sum(axis=1) == max_bytes + 1).all()
    zeros = batch.patch_lengths == 0
    assert (zeros[:, :-1] <= zeros[:, 1:]).all()
    assert np.count_nonzero(batch.x) == batch.mask.sum() == np.count_nonzero(batch.y)
    assert batch.padding == batch.mask.size - batch.mask.sum()
    assert not batch.mask[len(sequences) :].any()
    lost = 0
    for row, (ids, lengths) in enumerate(sequences):
        size = batch.mask[row].sum()
        assert batch.x[row, :size].tolist() == ids[:size].tolist()
        assert batch.y[row, :size].tolist() == ids[1 : size + 1].tolist()
        whole = len(ids) - (lengths[-1] if lengths[0] > 1 else 0)
        assert size == min(whole - 1, max_bytes)
        lost += len(ids) - size - 1
        # Every boundary inside the row is one of the stream's, but for the split of the first.
        ends = set(np.cumsum(batch.patch_lengths[row])[:-1].tolist())
        assert ends <= {1, *np.cumsum(lengths).tolist(), max_bytes + 1}
        assert ends >= {end for end in np.cumsum(lengths).tolist() if end < size + 1}
    assert batch.lost == lost


@given(streams(), st.integers(1, 5), st.integers(0, 2))
def test_byte_rows_train_every_position(stream, count, missing):
    documents = [(ids, np.ones_like(ids)) for ids, _ in stream[0]]
    sequences = list(itertools.islice(published_rows.patch_sequences(documents, stream[1]), count))
    if not sequences:
        return
    batch = published_rows.pack_byte_sequences(sequences, len(sequences) + missing)
    assert batch.mask[: len(sequences)].all() and not batch.mask[len(sequences) :].any()
    for row, (ids, _) in enumerate(sequences):
        assert batch.x[row].tolist() == ids.tolist()
        assert batch.y[row].tolist() == [*ids[1:].tolist(), 0]
    assert batch.padding == missing * stream[1]


def test_what_the_published_code_refuses_is_refused():
    sequence = (np.arange(1, 5), np.array([1, 3]))
    with pytest.raises(ValueError, match="longest row has 3 positions, max_bytes=4"):
        published_rows.pack_sequences([sequence], max_bytes=4, pad_to_max_length=False)
    assert published_rows.pack_sequences([sequence], 3, pad_to_max_length=False).padding == 0
    with pytest.raises(ValueError, match="id 0 is padding"):
        published_rows.pack_sequences([(np.arange(4), np.array([1, 3]))], max_bytes=4)


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match=r"entropies of shape \(3,\) for 4 ids"):
        published_rows.patch_document("ab", np.zeros(3, np.float16))
    with pytest.raises(ValueError, match="needs the entropies"):
        published_rows.patch_document("ab")
    with pytest.raises(ValueError, match="seq_len=1 must"):
        published_rows.patch_sequences([], 1)
    with pytest.raises(ValueError, match="buffer_size=0 at least"):
        published_rows.patch_sequences([], 2, buffer_size=0)
    with pytest.raises(ValueError, match="patches of 5 ids in a document of 4"):
        list(published_rows.patch_sequences([(np.arange(1, 5), np.array([2, 3]))], 2))
    for pack in (
        lambda: published_rows.pack_sequences([], 4),
        lambda: published_rows.pack_byte_sequences([]),
    ):
        with pytest.raises(ValueError, match="no sequences"):
            pack()
