"""Packing loses nothing, keeps patch boundaries, and obeys both budgets."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax.data.batches import packing
from bltjax.data.batches import rows as rows_module
from bltjax.vocabulary import EOS_ID, PAD_ID, encode


@st.composite
def documents(draw):
    """A few (ids, starts), short and long, from no inner patch starts to all of them."""
    result = []
    for _ in range(draw(st.integers(1, 5))):
        ids = encode(draw(st.binary(max_size=60)))
        density = draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        starts = rng.random(len(ids)) < density
        starts[:2] = True
        result.append((ids, starts))
    return result


@st.composite
def budgets(draw):
    row_patches = draw(st.integers(packing.MIN_ROW_PATCHES, 12))
    return draw(st.integers(row_patches, 40)), row_patches


def slow_pack_patches(docs, row_bytes, row_patches):
    """Packs patch by patch; returns each row's ([(document, position), ...], [length, ...])."""
    rows, inputs, lengths = [], [], []

    def place(document, position, length):
        inputs.extend((document, position + i) for i in range(length))
        lengths.append(length)
        return position + length

    for document, (ids, starts) in enumerate(docs):
        edges = [*np.flatnonzero(starts).tolist(), len(ids)]
        for begin, end in itertools.pairwise(edges):
            whole = begin
            while begin < end:
                room = row_bytes - len(inputs)
                if not inputs and end - begin > 1:  # Split a row's first patch.
                    whole = begin
                    begin = place(document, begin, 1)
                elif len(lengths) < row_patches - 1 and end - begin <= room:
                    begin = place(document, begin, end - begin)
                elif len(lengths) < row_patches - 1 and room and end - whole > row_bytes:
                    begin = whole = place(document, begin, room)
                else:
                    rows.append((inputs, lengths))
                    inputs, lengths, whole = [], [], begin
    return [*rows, (inputs, lengths)] if inputs else rows


def num_real(row):
    return np.count_nonzero(row.tokens != PAD_ID)


def real_patches(row):
    return row.patch_lengths[: np.count_nonzero(row.patch_lengths) - 1]


def assert_stream_is_kept(rows, all_ids):
    """Joined over rows, the inputs are the ids, each once and in order, with their successors."""
    successors = [np.append(ids[1:], PAD_ID) for ids in all_ids]
    has_successor = [np.arange(len(ids)) < len(ids) - 1 for ids in all_ids]
    for field, expected in (
        ("tokens", all_ids),
        ("targets", successors),
        ("loss_mask", has_successor),
    ):
        joined = [getattr(row, field)[: num_real(row)] for row in rows]
        np.testing.assert_array_equal(np.concatenate(joined), np.concatenate(expected))
    for row in rows:
        padding = slice(num_real(row), None)
        assert not row.tokens[padding].any()
        assert not row.targets[padding].any()
        assert not row.loss_mask[padding].any()


def assert_document_ids_count_documents(rows):
    """Ids count from 0 in each row, up by one after each EOS and once more for padding."""
    for row in rows:
        ends = np.flatnonzero(row.tokens == EOS_ID)
        expected = np.searchsorted(ends, np.arange(len(row.tokens)), side="left")
        if num_real(row) and row.tokens[num_real(row) - 1] != EOS_ID:
            expected[num_real(row) :] += 1
        np.testing.assert_array_equal(row.document_ids, expected)


@given(documents(), budgets())
def test_patches_keep_the_stream(docs, budget):
    rows = list(packing.pack_patches(docs, *budget))
    assert_stream_is_kept(rows, [ids for ids, _ in docs])
    assert_document_ids_count_documents(rows)
    assert all(num_real(row) for row in rows)


@given(documents(), st.integers(packing.MIN_ROW_BYTES, 40))
def test_bytes_keep_the_stream_and_fill_rows(docs, row_bytes):
    all_ids = [ids for ids, _ in docs]
    rows = list(packing.pack_bytes(all_ids, row_bytes))
    assert_stream_is_kept(rows, all_ids)
    assert_document_ids_count_documents(rows)
    assert all(row.patch_lengths.shape == (0,) for row in rows)
    assert all(num_real(row) == row_bytes for row in rows[:-1])
    assert len(rows) == -(-sum(map(len, all_ids)) // row_bytes)


@given(documents(), budgets())
def test_patches_obey_the_budgets(docs, budget):
    row_bytes, row_patches = budget
    for row in packing.pack_patches(docs, *budget):
        assert [len(field) for field in row] == [row_bytes] * 5 + [row_patches, 0]
        assert [field.dtype for field in row] == [np.int32, np.int32, bool, *[np.int32] * 4]
        used = np.count_nonzero(row.patch_lengths)
        assert (row.patch_lengths[:used] > 0).all() and not row.patch_lengths[used:].any()
        assert row.patch_lengths.sum() == row_bytes + 1
        assert real_patches(row).sum() == num_real(row)
        assert row.patch_lengths[used - 1] == row_bytes + 1 - num_real(row)
        assert row.patch_lengths[0] == 1


@given(documents(), budgets())
def test_boundaries_are_the_documents_but_for_the_allowed_splits(docs, budget):
    row_bytes, _ = budget
    rows = list(packing.pack_patches(docs, *budget))
    row_begins = np.cumsum([0] + [num_real(row) for row in rows])
    packed = set(np.cumsum(np.concatenate([[0], *map(real_patches, rows)])).tolist())
    wanted = np.flatnonzero(np.concatenate([starts for _, starts in docs]))
    total = int(row_begins[-1])
    lengths = np.diff(np.append(wanted, total))
    wanted_set = {*wanted.tolist(), total}
    assert wanted_set <= packed
    # The others: one byte into a row, or a row's end inside a patch that no row could hold.
    allowed = set((row_begins[:-1] + 1).tolist())
    for begin in row_begins.tolist():
        if begin not in wanted_set:
            assert lengths[np.searchsorted(wanted, begin, side="right") - 1] > row_bytes
            allowed.add(begin)
    assert packed - wanted_set <= allowed


@given(documents(), budgets())
def test_patches_equal_a_packer_that_goes_patch_by_patch(docs, budget):
    rows = list(packing.pack_patches(docs, *budget))
    expected = slow_pack_patches(docs, *budget)
    for row, (inputs, lengths) in zip(rows, expected, strict=True):
        assert real_patches(row).tolist() == lengths
        assert row.tokens[: len(inputs)].tolist() == [docs[d][0][i] for d, i in inputs]
        assert row.document_ids[: len(inputs)].tolist() == [d - inputs[0][0] for d, _ in inputs]


@given(documents(), budgets())
def test_packing_is_deterministic_and_leaves_documents_alone(docs, budget):
    before = [(ids.copy(), starts.copy()) for ids, starts in docs]
    for rows in zip(*(packing.pack_patches(docs, *budget) for _ in range(2)), strict=True):
        for left, right in zip(*rows, strict=True):
            np.testing.assert_array_equal(left, right)
    for left, right in zip(itertools.chain(*before), itertools.chain(*docs), strict=True):
        np.testing.assert_array_equal(left, right)


def with_starts(ids, *extra):
    starts = np.zeros(len(ids), bool)
    starts[[0, 1, *extra]] = True
    return ids, starts


def test_one_row_by_hand():
    docs = [with_starts(encode(b"")), with_starts(encode(b"a")), with_starts(encode(b"bcd"), 3)]
    (row,) = packing.pack_patches(docs, row_bytes=12, row_patches=9)
    assert row.tokens.tolist() == [1, 2, 1, 101, 2, 1, 102, 103, 104, 2, 0, 0]
    assert row.targets.tolist() == [2, 0, 101, 2, 0, 102, 103, 104, 2, 0, 0, 0]
    assert row.loss_mask.tolist() == [x == 1 for x in (1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0)]
    assert row.document_ids.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert row.patch_lengths.tolist() == [1, 1, 1, 2, 1, 2, 2, 3, 0]


def test_a_continued_document_by_hand():
    # Patches of 1, 3 and 4: the last does not fit beside the others.
    docs = [with_starts(encode(b"abcdef"), 4)]
    first, second = packing.pack_patches(docs, row_bytes=6, row_patches=4)
    assert first.tokens.tolist() == [1, 101, 102, 103, 0, 0]
    assert first.targets.tolist() == [101, 102, 103, 104, 0, 0]  # 104 is in the next row.
    assert first.patch_lengths.tolist() == [1, 3, 3, 0]
    assert second.tokens.tolist() == [104, 105, 106, 2, 0, 0]
    assert second.document_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert second.patch_lengths.tolist() == [1, 3, 3, 0]


def test_a_patch_longer_than_a_row_by_hand():
    # Patches of 1, 5 and 14 in rows of 6: the third finds its row full, then fills two and a half.
    docs = [with_starts(encode(bytes(18)), 6)]
    rows = list(packing.pack_patches(docs, row_bytes=6, row_patches=4))
    lengths = [row.patch_lengths.tolist() for row in rows]
    assert lengths == [[1, 5, 1, 0], [1, 5, 1, 0], [1, 5, 1, 0], [1, 1, 5, 0]]
    # Patches of 1 and 6: too long for the row that BOS begins, but not for a row.
    docs = [with_starts(encode(bytes(5)))]
    rows = list(packing.pack_patches(docs, row_bytes=6, row_patches=4))
    assert [row.patch_lengths.tolist() for row in rows] == [[1, 6, 0, 0], [1, 5, 1, 0]]
    # Patches of 1 and 7: too long for any row, so cut where this one ends.
    docs = [with_starts(encode(bytes(6)))]
    rows = list(packing.pack_patches(docs, row_bytes=6, row_patches=4))
    assert [row.patch_lengths.tolist() for row in rows] == [[1, 5, 1, 0], [1, 1, 5, 0]]


@pytest.mark.parametrize("row_bytes, row_patches", [(2048, 512), (2048, 3), (1000, 1000)])
def test_a_long_document_without_starts_fills_its_rows(row_bytes, row_patches):
    ids, starts = with_starts(encode(bytes(2_000_000)))
    rows = list(packing.pack_patches([(ids, starts)], row_bytes, row_patches))
    assert len(rows) == -(-len(ids) // row_bytes)
    assert_stream_is_kept(rows, [ids])
    assert all(num_real(row) == row_bytes for row in rows[:-1])


@pytest.mark.parametrize("starts_everywhere", [False, True])
def test_the_smallest_budgets_make_progress(starts_everywhere):
    ids, starts = with_starts(encode(bytes(100)))
    starts |= starts_everywhere
    rows = list(packing.pack_patches([(ids, starts)], row_bytes=3, row_patches=3))
    assert_stream_is_kept(rows, [ids])


def test_utilisation_counts_inputs_and_their_patches():
    docs = [with_starts(encode(b"abcdef"), 4)]
    rows = list(packing.pack_patches(docs, row_bytes=6, row_patches=4))
    expected = {"byte_utilisation": 8 / 12, "patch_utilisation": 4 / 8}
    assert rows_module.utilisation(rows) == pytest.approx(expected)
    byte_rows = packing.pack_bytes([docs[0][0]], row_bytes=5)
    assert rows_module.utilisation(byte_rows) == {"byte_utilisation": pytest.approx(8 / 10)}


def test_no_documents_give_no_rows():
    assert list(packing.pack_patches([], 8, 4)) == []
    assert list(packing.pack_bytes([], 8)) == []
    with pytest.raises(ValueError, match="no rows"):
        rows_module.utilisation([])


@pytest.mark.parametrize(
    "row_bytes, row_patches, message",
    [
        (1, 3, "row_bytes=1 must"),
        (8, 2, "row_patches=2 must"),
        (7, 8, "row_bytes=7.*row_patches=8"),
    ],
)
def test_bad_budgets_are_refused_at_once(row_bytes, row_patches, message):
    with pytest.raises(ValueError, match=message):
        packing.pack_patches([], row_bytes, row_patches)


def test_a_byte_row_of_one_position_is_refused_at_once():
    with pytest.raises(ValueError, match="row_bytes=1 must"):
        packing.pack_bytes([], 1)


@pytest.mark.parametrize(
    "starts", [[True, True], [False, True, True], [True, False, True]], ids=str
)
def test_malformed_starts_are_refused(starts):
    with pytest.raises(ValueError, match="starts of shape"):
        list(packing.pack_patches([(encode(b"a"), np.array(starts))], 8, 4))


@pytest.mark.parametrize("ids", [np.zeros(0, int), np.zeros((2, 2), int)], ids=["empty", "matrix"])
def test_malformed_ids_are_refused(ids):
    with pytest.raises(ValueError, match="must be a vector"):
        list(packing.pack_bytes([ids], 8))
    with pytest.raises(ValueError, match="must be a vector"):
        list(packing.pack_patches([(ids, np.ones(ids.shape, bool))], 8, 4))
