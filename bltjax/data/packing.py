"""Packs documents into rows of static shape under two budgets: byte positions and patches.

A row closes at a patch boundary when the next patch would exceed either budget, and the rest of
the document goes on in the next row: no byte is dropped and no boundary moves, except that

* a row that begins inside a document has its first patch split in [1, length - 1], since the
  published model expects every row to begin with a patch of one byte (spec 8.4);
* a patch longer than a whole row is cut at the end of the row it is in.

Patch lengths follow the published N+1 convention: they sum to `row_bytes + 1`, because predicting
the last byte's successor needs to know whether a patch opens there. A row with n real bytes has
their patches first, then one tail patch of `row_bytes + 1 - n` that holds position n and all
padding, then zeros.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from bltjax.vocabulary import PAD_ID

# A row must be able to hold [1, length - 1] of a split first patch, and the tail.
MIN_ROW_PATCHES = 3
MIN_ROW_BYTES = 2


class Row(NamedTuple):
    """One packed row, or a stack of rows with a leading axis; L byte positions, P patches.

    tokens [L]: ids, PAD_ID in the padding. targets [L]: the id that follows in the same document,
    also where it is the first of the next row; PAD_ID where there is none. loss_mask [L]: whether
    there is one. document_ids [L]: counted from 0 in each row; padding has one more than the last.
    patch_lengths [P]: sum to L + 1 (P is 0 in rows without patches).
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    document_ids: np.ndarray
    patch_lengths: np.ndarray


def pack_patches(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], row_bytes: int, row_patches: int
) -> Iterator[Row]:
    """Yields rows of whole patches, of `row_bytes` positions and `row_patches` patches each.

    A document is (ids, starts): int [S], from BOS to EOS, and bool [S], True where a patch starts;
    starts[0] and starts[1] are True. A row holds at most `row_patches - 1` real patches and the
    tail. Raises ValueError at once for budgets with which packing could not go on, and on reaching
    a malformed document.
    """
    _check_row_bytes(row_bytes)
    if row_patches < MIN_ROW_PATCHES:
        raise ValueError(
            f"row_patches={row_patches} must be at least {MIN_ROW_PATCHES}: a first patch split in"
            " two, and the tail"
        )
    if row_bytes < row_patches:
        raise ValueError(
            f"row_bytes={row_bytes} is less than row_patches={row_patches}: a row cannot hold more"
            " patches than bytes; raise row_bytes or lower row_patches"
        )
    with_ends = ((ids, _patch_ends(ids, starts)) for ids, starts in documents)
    return _pack(with_ends, lambda: _OpenRow(row_bytes, row_patches), _take_patches)


def pack_bytes(documents: Iterable[np.ndarray], row_bytes: int) -> Iterator[Row]:
    """Yields rows without patches, filled completely; the only padding is in the last row.

    A document is its ids, int [S], from BOS to EOS. Raises ValueError at once if `row_bytes` is
    less than 2, and on reaching a document without ids.
    """
    _check_row_bytes(row_bytes)
    with_ends = ((_checked_ids(ids), np.array([len(ids)])) for ids in documents)
    return _pack(with_ends, lambda: _OpenRow(row_bytes, 0), _take_bytes)


def stack(rows: Iterable[Row]) -> Row:
    """Stacks rows along a leading axis in compact types, to be kept in memory.

    tokens and targets uint16 [R, L], loss_mask bool [R, L], document_ids int32 [R, L],
    patch_lengths int32 [R, P]: 9 bytes a position and 4 a patch. Raises ValueError if there are no
    rows.
    """
    fields = list(zip(*rows, strict=True))
    if not fields:
        raise ValueError("no rows to stack: give at least one document to the packer")
    dtypes = Row(np.uint16, np.uint16, np.bool_, np.int32, np.int32)
    pairs = zip(fields, dtypes, strict=True)
    return Row(*(np.stack(field).astype(dtype) for field, dtype in pairs))


def utilisation(rows: Row | Iterable[Row]) -> dict[str, float]:
    """Returns the share of each budget that is useful, for rows or the result of `stack`.

    byte_utilisation: share of byte positions that hold an input. patch_utilisation: share of patch
    slots that hold a patch of inputs (the tail is none); absent for rows without patches. Raises
    ValueError if there are no rows.
    """
    stacked = rows if isinstance(rows, Row) else stack(rows)
    shares = {"byte_utilisation": float(np.mean(stacked.tokens != PAD_ID))}
    lengths = np.atleast_2d(stacked.patch_lengths)
    if lengths.size:
        real_patches = np.count_nonzero(lengths) - len(lengths)
        shares["patch_utilisation"] = float(real_patches / lengths.size)
    return shares


class _OpenRow:
    """The row being filled, and how much of its budgets is used."""

    def __init__(self, row_bytes: int, row_patches: int):
        self.row = Row(
            tokens=np.full(row_bytes, PAD_ID, np.int32),
            targets=np.full(row_bytes, PAD_ID, np.int32),
            loss_mask=np.zeros(row_bytes, np.bool_),
            document_ids=np.zeros(row_bytes, np.int32),
            patch_lengths=np.zeros(row_patches, np.int32),
        )
        self.row_bytes = row_bytes
        self.num_bytes = self.num_patches = self.num_documents = 0

    @property
    def free_bytes(self) -> int:
        return self.row_bytes - self.num_bytes

    @property
    def free_patches(self) -> int:
        return len(self.row.patch_lengths) - 1 - self.num_patches  # One is for the tail.

    def append(self, ids: np.ndarray, position: int, ends: np.ndarray) -> None:
        """Copies ids[position:ends[-1]] as the patches that end before each of `ends`."""
        following = ids[position + 1 : ends[-1] + 1]  # One fewer than inputs at a document's end.
        begin, end = self.num_bytes, self.num_bytes + int(ends[-1]) - position
        self.row.tokens[begin:end] = ids[position : ends[-1]]
        self.row.targets[begin : begin + len(following)] = following
        self.row.loss_mask[begin : begin + len(following)] = True
        self.row.document_ids[begin:end] = self.num_documents
        if len(self.row.patch_lengths):
            lengths = np.diff(ends, prepend=position)
            self.row.patch_lengths[self.num_patches : self.num_patches + len(ends)] = lengths
            self.num_patches += len(ends)
        self.num_bytes = end
        self.num_documents += 1

    def close(self) -> Row:
        """Returns the row, padded, with its tail patch."""
        self.row.document_ids[self.num_bytes :] = self.num_documents
        if len(self.row.patch_lengths):
            self.row.patch_lengths[self.num_patches] = self.free_bytes + 1
        return self.row


# Given a document's patch ends, the position reached in it and the open row: the ends of the
# patches to append to that row. Never empty for an empty row, or packing would not go on.
_Take = Callable[[np.ndarray, int, _OpenRow], np.ndarray]


def _pack(
    documents: Iterable[tuple[np.ndarray, np.ndarray]],
    open_row: Callable[[], _OpenRow],
    take: _Take,
) -> Iterator[Row]:
    row = open_row()
    for ids, ends in documents:
        position = 0
        while position < len(ids):
            taken = take(ends, position, row)
            if len(taken):
                row.append(ids, position, taken)
                position = int(taken[-1])
            if position < len(ids):
                yield row.close()
                row = open_row()
    if row.num_bytes:
        yield row.close()


def _take_bytes(ends: np.ndarray, position: int, row: _OpenRow) -> np.ndarray:
    """Whatever fits, as one piece."""
    return np.minimum(ends, position + row.free_bytes)[: row.free_bytes]


def _take_patches(ends: np.ndarray, position: int, row: _OpenRow) -> np.ndarray:
    """As many whole patches as both budgets allow, with the two exceptions of the module."""
    row_end = position + row.free_bytes
    first = np.searchsorted(ends, position, side="right")
    split_first = row.num_bytes == 0 and ends[first] > position + 1
    num_fitting = np.searchsorted(ends, row_end, side="right") - first
    num_whole = min(num_fitting, row.free_patches - split_first)
    taken = ends[first : first + num_whole]
    reached = int(taken[-1]) if num_whole else position
    if split_first:
        taken = np.insert(taken, 0, position + 1)
    has_room = len(taken) < row.free_patches and reached < min(row_end, ends[-1])
    # No row could hold the next patch: closing this one early would only move the cut.
    if has_room and ends[first + num_whole] - reached > row.row_bytes:
        taken = np.append(taken, row_end)
    return taken


def _patch_ends(ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns where each patch ends (exclusive), int64 [number of patches]."""
    _checked_ids(ids)
    if np.shape(starts) != np.shape(ids) or not np.all(starts[:2]):
        raise ValueError(
            f"starts of shape {np.shape(starts)} beginning {np.asarray(starts)[:2]} for ids of"
            f" shape {np.shape(ids)}: give one bool per id, True for the first two"
        )
    return np.append(np.flatnonzero(starts)[1:], len(ids))


def _checked_ids(ids: np.ndarray) -> np.ndarray:
    if np.ndim(ids) != 1 or not len(ids):
        raise ValueError(
            f"document ids of shape {np.shape(ids)} must be a vector of at least one id: encode"
            " documents with BOS and EOS"
        )
    return ids


def _check_row_bytes(row_bytes: int) -> None:
    if row_bytes < MIN_ROW_BYTES:
        raise ValueError(
            f"row_bytes={row_bytes} must be at least {MIN_ROW_BYTES}: give rows room for an input"
            " and its successor"
        )
