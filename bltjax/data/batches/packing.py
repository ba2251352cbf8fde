"""Packs documents into rows of static shape under two budgets: byte positions and patches.

A row ends at a patch boundary when the next patch would exceed either budget, and the rest of the
document goes into a later row. No byte is dropped and no boundary moves, except that

* the first patch of a row that begins inside a document is split in [1, length - 1], since the
  published model expects every row to begin with a patch of one byte (model.md#rows);
* a patch longer than a whole row is cut at the end of its row.

Documents differ in bytes per patch (languages, code, tables), and a row of one kind runs out of
one budget long before the other. So a few documents are open at a time. A row begins with the one
that has waited longest, takes whole documents that bring it closest to using up both budgets, and
ends with a piece of one document. Where that would leave more than `slack` of a row's compute to
padding, a second document with the opposite bytes per patch is cut too, so that both budgets run
out together. A document that is cut waits behind the others, so that consecutive rows differ as
much as rows of a shuffled corpus do.

Patch lengths follow the published N+1 convention: they sum to `row_bytes + 1`, because predicting
the last byte's successor needs to know whether a patch opens there. A row with n real bytes has
their patches first, then one tail patch of `row_bytes + 1 - n` that holds position n and all
padding, then zeros.
"""

import bisect
import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from bltjax.data.batches.rows import Row
from bltjax.patching.calibrate import BYTE_COMPUTE, PATCH_COMPUTE
from bltjax.vocabulary import PAD_ID

# A row must have room for a first patch that is split in two, and for the tail.
MIN_ROW_PATCHES = 3
MIN_ROW_BYTES = 2
# Limits memory: with POOL_BYTES in open documents no more are opened, unless there are < MIN_OPEN.
POOL_BYTES, MIN_OPEN = 4_000_000, 4


class OpenDocument:
    """A document whose ids before `position` are in rows already.

    ids: int [S], from BOS to EOS. ends: exclusive end of each patch; None for rows without patches.
    source: number of its source in the corpus. index: its place in the stream of documents.
    learned: bool [S], which ids are targets; None: all of them. teacher_tokens: int32 [S], see
    `Row`; None: there is no teacher.
    """

    def __init__(
        self,
        ids,
        ends=None,
        source: int = 0,
        index: int = 0,
        position: int = 0,
        learned=None,
        teacher_tokens=None,
    ):
        self.ids, self.ends, self.source, self.index = ids, ends, source, index
        self.learned, self.teacher_tokens = learned, teacher_tokens
        self.advance_to(position)

    def advance_to(self, position: int):
        self.position = position
        self.first = 0 if self.ends is None else int(self.ends.searchsorted(position, "right"))

    @property
    def num_bytes(self) -> int:
        """Number of ids that are left."""
        return len(self.ids) - self.position

    @property
    def num_patches(self) -> int:
        """Number of patches that are left."""
        return len(self.ends) - self.first

    @property
    def begins_in_patch(self) -> bool:
        """True where a row that begins here has to split its first patch."""
        return int(self.ends[self.first]) > self.position + 1

    def fitting(self, free_bytes: int, free_patches: int, row_bytes: int) -> "Piece":
        """Returns the largest piece that both budgets allow."""
        near = self.ends[self.first : self.first + min(free_bytes, free_patches) + 1]
        row_end = self.position + free_bytes
        num = min(int(near.searchsorted(row_end, "right")), free_patches)
        reached = int(near[num - 1]) if num else self.position
        has_room = num < min(free_patches, len(near)) and reached < row_end
        # The next patch fits in no row: ending this row early would only move the cut.
        if has_room and int(near[num]) - reached > row_bytes:
            return Piece(self, self.position, row_end, num + 1)
        return Piece(self, self.position, reached, num)

    def next_patches(self, num_patches: int) -> "Piece":
        """Returns the piece of the next `num_patches` patches."""
        stop = int(self.ends[self.first + num_patches - 1]) if num_patches else self.position
        return Piece(self, self.position, stop, num_patches)

    def lengths(self, start: int, stop: int, split_first: bool) -> np.ndarray:
        """Returns the lengths of the patches of ids[start:stop], cut at these limits."""
        first, last = self.ends.searchsorted(start, "right"), self.ends.searchsorted(stop, "left")
        edges = np.concatenate([[start], self.ends[first:last], [stop]])
        if split_first and edges[1] > start + 1:
            edges = np.insert(edges, 1, start + 1)
        return np.diff(edges)


class Piece(NamedTuple):
    """Part of a document: ids[start:stop], which are `num_patches` patches."""

    document: OpenDocument
    start: int
    stop: int
    num_patches: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


class Budget(NamedTuple):
    """Free byte positions and patches of a row."""

    num_bytes: int
    num_patches: int

    @property
    def course(self) -> float:
        """Bytes per patch that would use up both."""
        return self.num_bytes / max(self.num_patches, 1)

    def without(self, piece: Piece) -> "Budget":
        return Budget(self.num_bytes - piece.num_bytes, self.num_patches - piece.num_patches)


class Packer:
    """Fills rows from a stream of documents, of which it keeps up to `pool` open.

    Its whole state is `open`, documents with their positions. slack: the share of a row's compute
    that may go to padding before a second document is cut. Raises ValueError for budgets that are
    too small to pack anything.
    """

    def __init__(self, row_bytes: int, row_patches: int, pool: int = 1, slack: float = 0.0):
        _check_budgets(row_bytes, row_patches)
        self.row_bytes, self.row_patches = row_bytes, row_patches
        self.pool, self.slack = pool, slack
        self.empty = Budget(row_bytes, row_patches - 1)  # of a row; a patch is for the tail
        self.open: list[OpenDocument] = []  # those that have waited longest come first

    def next_row(self, documents: Iterator[OpenDocument]) -> Row | None:
        """Returns the next row, or None at the end of the stream."""
        pieces = self._pieces(documents) if self.row_patches else self._byte_pieces(documents)
        return self._row(pieces) if pieces else None

    def _byte_pieces(self, documents) -> list[Piece]:
        """Returns the pieces of a row without patches: ids in order until it is full."""
        pieces, free = [], self.row_bytes
        while free and self._refill(documents):
            document = self.open[0]
            stop = min(document.position + free, len(document.ids))
            pieces.append(Piece(document, document.position, stop, 0))
            free -= pieces[-1].num_bytes
            self._take(pieces[-1])
        return pieces

    def _pieces(self, documents) -> list[Piece]:
        """Returns the pieces of a row: whole documents while some fit, then `_last_pieces`."""
        pieces, free = [], self.empty
        while self._refill(documents):
            if not pieces and self.open[0].begins_in_patch:
                free = Budget(free.num_bytes, free.num_patches - 1)
            if pieces and self._waste(free) <= self.slack / 4:
                break  # a piece this small is worth no cut
            document = self._best_whole(free, self.open if pieces else self.open[:1])
            if document is not None:
                taken = [document.next_patches(document.num_patches)]
                self._take(taken[0])
            else:
                taken = self._last_pieces(free)
            pieces += taken
            for piece in taken:
                free = free.without(piece)
            if not taken or any(piece.document in self.open for piece in taken):
                break
        return pieces

    def _best_whole(self, free: Budget, candidates) -> OpenDocument | None:
        """Returns the fitting document that best keeps both budgets running out together.

        None where none fits, or where the other documents could fill the row without it but not
        with it.
        """
        sizes = np.array([(d.num_bytes, d.num_patches) for d in candidates])
        fits = (sizes <= free).all(axis=1)
        if not fits.any():
            return None
        left = np.array(free) - sizes
        off_course = abs(left[:, 0] - left[:, 1] * self.empty.course)
        best = int(np.where(fits, off_course, np.inf).argmin())
        rest = Budget(*map(int, left[best]))
        others = [d.num_bytes / d.num_patches for d in self.open if d is not candidates[best]]
        if others and self._waste(rest) > self.slack:
            low, high = min(others), max(others)
            if low <= free.course <= high and not low <= rest.course <= high:
                return None
        return candidates[best]

    def _last_pieces(self, free: Budget) -> list[Piece]:
        """Returns a piece of the document that has waited longest, and pieces that balance it."""
        first, balancing = self.open[0], []
        while True:
            piece = first.fitting(*free, self.row_bytes)
            left = free.without(piece)
            cut = balancing and balancing[-1].document in self.open
            if cut or self._waste(left) <= self.slack:
                break
            other = self._balancing(first, free, self._lacks_bytes(left))
            if other is None:
                break
            balancing.append(other)
            self._take(other)
            free = free.without(other)
        if piece.num_bytes:
            balancing.insert(0, piece)
            self._take(piece)
        return balancing

    def _balancing(self, first, free: Budget, lacks_bytes: bool) -> Piece | None:
        """Returns a piece of another document after which `first` nearly uses up both budgets."""
        of_other_kind = (
            d for d in self.open[1:] if lacks_bytes == (d.num_bytes < free.course * d.num_patches)
        )
        other = next(of_other_kind, None)
        if other is None:
            return None
        whole = other.fitting(*free, self.row_bytes)
        whole_patches = whole == other.next_patches(whole.num_patches)
        most = whole.num_patches - (not whole_patches)

        def lacks_the_same(num_patches: int) -> bool:
            """Returns True where `first` still fits, and runs out of the same budget."""
            after = free.without(other.next_patches(num_patches))
            piece = first.fitting(*after, self.row_bytes)
            return piece.num_bytes > 0 and self._lacks_bytes(after.without(piece)) == lacks_bytes

        # As many patches as possible, so the search goes from the most down.
        num = most - bisect.bisect_left(range(most, 0, -1), True, key=lacks_the_same)
        return other.next_patches(num) if num else None

    def _lacks_bytes(self, left: Budget) -> bool:
        """Returns True where a row that leaves this ran out of bytes before patches."""
        return left.num_bytes < left.num_patches * self.empty.course

    def _waste(self, left: Budget) -> float:
        """Returns the share of a row's compute that goes to what is left of it."""
        return (
            BYTE_COMPUTE * left.num_bytes / self.row_bytes
            + PATCH_COMPUTE * left.num_patches / self.row_patches
        )

    def _refill(self, documents) -> bool:
        """Opens documents up to the size of the pool; returns True if there are any."""
        while len(self.open) < self.pool:
            enough = sum(document.num_bytes for document in self.open) >= POOL_BYTES
            if enough and len(self.open) >= MIN_OPEN:
                break
            document = next(documents, None)
            if document is None:
                break
            self.open.append(document)
        return bool(self.open)

    def _take(self, piece: Piece):
        piece.document.advance_to(piece.stop)
        self.open.remove(piece.document)
        if piece.document.num_bytes:
            self.open.append(piece.document)

    def _row(self, pieces: list[Piece]) -> Row:
        """Joins pieces to a row, with padding and the tail patch."""
        row = Row(
            tokens=np.full(self.row_bytes, PAD_ID, np.int32),
            targets=np.full(self.row_bytes, PAD_ID, np.int32),
            loss_mask=np.zeros(self.row_bytes, np.bool_),
            document_ids=np.full(self.row_bytes, len(pieces), np.int32),
            source_ids=np.zeros(self.row_bytes, np.int32),
            patch_lengths=np.zeros(self.row_patches, np.int32),
        )
        if pieces[0].document.teacher_tokens is not None:
            row = row._replace(teacher_tokens=np.zeros(self.row_bytes, np.int32))
        begin = first = 0
        for number, (document, start, stop, _) in enumerate(pieces):
            targets = slice(start + 1, stop + 1)
            following = document.ids[targets]  # one fewer at a document's end
            end = begin + stop - start
            row.tokens[begin:end] = document.ids[start:stop]
            row.targets[begin : begin + len(following)] = following
            learned = True if document.learned is None else document.learned[targets]
            row.loss_mask[begin : begin + len(following)] = learned
            row.document_ids[begin:end] = number
            row.source_ids[begin:end] = document.source
            if document.teacher_tokens is not None:
                row.teacher_tokens[begin:end] = document.teacher_tokens[start:stop]
            if self.row_patches:
                lengths = document.lengths(start, stop, split_first=number == 0)
                row.patch_lengths[first : first + len(lengths)] = lengths
                first += len(lengths)
            begin = end
        if self.row_patches:
            row.patch_lengths[first] = self.row_bytes + 1 - begin
        return row


def pack_patches(
    documents: Iterable[tuple[np.ndarray, np.ndarray]],
    row_bytes: int,
    row_patches: int,
    pool: int = 1,
    slack: float = 0.0,
) -> Iterator[Row]:
    """Yields rows of whole patches, of `row_bytes` positions and `row_patches` patches each.

    A document is (ids, starts): int [S], from BOS to EOS, and bool [S], True where a patch starts;
    starts[0] and starts[1] are True. A row holds at most `row_patches - 1` real patches and the
    tail. With a `pool` of 1 documents stay in their order. Raises ValueError at once for budgets
    that are too small, and on reaching a malformed document.
    """
    _check_row_patches(row_patches)  # 0 would mean rows without patches
    packer = Packer(row_bytes, row_patches, pool, slack)
    opened = (OpenDocument(checked(ids), patch_ends(ids, starts)) for ids, starts in documents)
    return iter(functools.partial(packer.next_row, opened), None)


def pack_bytes(documents: Iterable[np.ndarray], row_bytes: int) -> Iterator[Row]:
    """Yields rows without patches, filled completely; the only padding is in the last row.

    A document is its ids, int [S], from BOS to EOS. Raises ValueError at once if `row_bytes` is
    less than 2, and on reaching a document without ids.
    """
    opened = (OpenDocument(checked(ids)) for ids in documents)
    return iter(functools.partial(Packer(row_bytes, 0).next_row, opened), None)


def patch_ends(ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns the exclusive end of each patch, int64 [number of patches]."""
    if np.shape(starts) != np.shape(ids) or not np.all(starts[:2]):
        raise ValueError(
            f"starts of shape {np.shape(starts)} beginning {np.asarray(starts)[:2]} for ids of"
            f" shape {np.shape(ids)}: give one bool per id, True for the first two"
        )
    return np.append(np.flatnonzero(starts)[1:], len(ids))


def checked(ids: np.ndarray) -> np.ndarray:
    """Returns the ids of a document. Raises ValueError unless they are a vector of at least one."""
    if np.ndim(ids) != 1 or not len(ids):
        raise ValueError(
            f"document ids of shape {np.shape(ids)} must be a vector of at least one id: encode"
            " documents with BOS and EOS"
        )
    return ids


def _check_budgets(row_bytes: int, row_patches: int) -> None:
    if row_bytes < MIN_ROW_BYTES:
        raise ValueError(
            f"row_bytes={row_bytes} must be at least {MIN_ROW_BYTES}: give rows room for an input"
            " and its successor"
        )
    if row_patches:
        _check_row_patches(row_patches)
    if row_bytes < row_patches:
        raise ValueError(
            f"row_bytes={row_bytes} is less than row_patches={row_patches}: a row cannot hold more"
            " patches than bytes; raise row_bytes or lower row_patches"
        )


def _check_row_patches(row_patches: int) -> None:
    if row_patches < MIN_ROW_PATCHES:
        raise ValueError(
            f"row_patches={row_patches} must be at least {MIN_ROW_PATCHES}: a first patch split in"
            " two, and the tail"
        )
