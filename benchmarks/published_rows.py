"""Packs rows as the published training code does, to compare padding with ours (model.md#rows).

The patches of all documents form one stream, which is cut into sequences of a fixed number of
patches. Each sequence is then cut or padded to a static number of bytes, which `Batch` counts.
`bltjax.data.batches.packing` drops nothing and pads little.

The stream goes document by document through three functions:

    documents = itertools.cycle([patch_document(text, entropies), ...])
    sequences = patch_sequences(documents, seq_len, buffer_size, shuffle_rng(seed))
    batch = pack_sequences(itertools.islice(sequences, batch_size), max_bytes)
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from bltjax.config import PatchingConfig
from bltjax.patching.boundaries import lengths_from_starts, patch_starts
from bltjax.vocabulary import PAD_ID, encode

# Ids int32 [S] and the lengths int32 [P] of their patches, which sum to S.
Patched = tuple[np.ndarray, np.ndarray]


class Batch(NamedTuple):
    """A batch of B rows of M positions and P patches, under the published names.

    x, y int32 [B, M]: inputs and the ids that follow them, PAD_ID in the padding. A row may begin
    and end inside a document; a document's EOS is followed by the next one's BOS. mask bool [B, M]:
    True where the loss counts. patch_lengths int32 [B, P]: rows sum to M + 1; the last patch of a
    short row holds its padding, and a cut row ends in zeros (P is 0 in rows without patches).
    lost: number of ids of the sequences that are neither in x nor in y.
    """

    x: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    patch_lengths: np.ndarray
    lost: int

    @property
    def padding(self) -> int:
        """Number of positions of x that hold no id."""
        return int(np.count_nonzero(self.x == PAD_ID))


def patch_document(
    text: bytes | str, entropies=None, patching: PatchingConfig = PatchingConfig()
) -> Patched:
    """Returns a document's ids, from BOS to EOS, and patch lengths, by default as released.

    entropies: nats [S], one after each id; needed by the entropy rules only. Raises ValueError
    where their number differs from that of the ids.
    """
    ids = encode(text)
    if entropies is not None:
        entropies = np.asarray(entropies)
        if entropies.shape != ids.shape:
            raise ValueError(
                f"entropies of shape {entropies.shape} for {len(ids)} ids: a document has one for "
                "each byte and for BOS and EOS, compute them again from the same text"
            )
    starts = patch_starts(patching, ids, entropies)
    return ids, lengths_from_starts(starts[: len(ids)])  # No patch for what follows the document.


def shuffle_rng(seed: int, rank: int = 0, world: int = 1) -> np.random.Generator:
    """Returns the published random generator for shuffling in data worker `rank` of `world`."""
    return np.random.default_rng((seed + 1, rank, world))


def patch_sequences(
    documents: Iterable[Patched],
    seq_len: int,
    buffer_size: int = 1,
    rng: np.random.Generator | None = None,
) -> Iterator[Patched]:
    """Yields sequences of exactly `seq_len` patches, shuffled in buffers if `rng` is given.

    A buffer is `buffer_size` consecutive sequences of the stream. Documents at the end that do not
    fill a buffer are left out; published streams repeat without end. Raises ValueError at once for
    sizes too small, and on reaching a document whose patches do not sum to its ids.
    """
    if seq_len < 2 or buffer_size < 1:
        raise ValueError(
            f"seq_len={seq_len} must be at least 2, a row of one byte has nothing to predict, and "
            f"buffer_size={buffer_size} at least 1"
        )
    return _sequences(documents, seq_len, buffer_size, rng)


def _sequences(documents, seq_len, buffer_size, rng):
    for ids, lengths in _buffers(documents, seq_len * buffer_size):
        lengths = lengths.reshape(buffer_size, seq_len)
        ends = np.cumsum(lengths.sum(axis=1))
        rows = np.split(ids, ends[:-1])
        for row in range(buffer_size) if rng is None else rng.permutation(buffer_size):
            yield rows[row], lengths[row]


def _buffers(documents: Iterable[Patched], num_patches: int) -> Iterator[Patched]:
    """Yields the stream of documents in pieces of `num_patches` patches."""
    waiting, num_waiting = [], 0
    for ids, lengths in documents:
        if np.sum(lengths) != len(ids):
            raise ValueError(
                f"patches of {np.sum(lengths)} ids in a document of {len(ids)}: give lengths that "
                "cover the document and nothing after it"
            )
        waiting.append((ids, lengths))
        num_waiting += len(lengths)
        if num_waiting < num_patches:
            continue
        ids, lengths = map(np.concatenate, zip(*waiting, strict=True))
        while len(lengths) >= num_patches:
            end = lengths[:num_patches].sum()
            yield ids[:end], lengths[:num_patches]
            ids, lengths = ids[end:], lengths[num_patches:]
        waiting, num_waiting = [(ids, lengths)], len(lengths)


def pack_sequences(
    sequences: Iterable[Patched],
    max_bytes: int,
    pad_to_max_length: bool = True,
    batch_size: int | None = None,
) -> Batch:
    """Returns a batch of `max_bytes` positions from sequences with the same number of patches.

    Fewer sequences than `batch_size` are followed by rows of padding. Raises ValueError for no
    sequences, for ids that would be taken for padding, and, without `pad_to_max_length`, where all
    sequences are shorter than `max_bytes`: the published code only cuts then.
    """
    sequences = _not_empty(sequences)
    for ids, _ in sequences:
        if not np.all(ids != PAD_ID):
            raise ValueError(f"id {PAD_ID} is padding: remove it from the documents")
    kept = [_with_first_patch_of_one(ids, lengths) for ids, lengths in sequences]
    longest = max(len(ids) for ids, _ in kept) - 1
    if longest < max_bytes and not pad_to_max_length:
        raise ValueError(
            f"the longest row has {longest} positions, max_bytes={max_bytes}: set "
            "pad_to_max_length, or lower max_bytes"
        )
    shape = (max(batch_size or 0, len(kept)), max_bytes)
    x, y = np.full((2, *shape), PAD_ID, np.int32)
    mask = np.zeros(shape, np.bool_)
    lengths = np.stack([_fitted(lengths, max_bytes + 1) for _, lengths in kept])
    lost = 0
    for row, (ids, _) in enumerate(kept):
        size = min(len(ids) - 1, max_bytes)
        x[row, :size], y[row, :size], mask[row, :size] = ids[:size], ids[1 : size + 1], True
        lost += len(sequences[row][0]) - (size + 1)
    # Rows of padding get the last row's patches: unused, but their sum must be right.
    filling = np.repeat(lengths[-1:], len(x) - len(kept), axis=0)
    return Batch(x, y, mask, np.concatenate([lengths, filling]), lost)


def pack_byte_sequences(sequences: Iterable[Patched], batch_size: int | None = None) -> Batch:
    """Returns a batch without patches from sequences of equal length, for the entropy model.

    Sequences come from documents patched by the rule "byte". As published, the last target of a row
    is PAD_ID and counts in the loss, although the next id is known. Fewer sequences than
    `batch_size` are followed by rows of padding. Raises ValueError for no sequences.
    """
    x = np.stack([ids for ids, _ in _not_empty(sequences)]).astype(np.int32)
    missing = max(batch_size or 0, len(x)) - len(x)
    mask = np.pad(np.ones(x.shape, np.bool_), ((0, missing), (0, 0)))
    x = np.pad(x, ((0, missing), (0, 0)), constant_values=PAD_ID)
    y = np.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=PAD_ID)
    return Batch(x, y, mask, np.zeros((len(x), 0), np.int32), lost=0)


def _not_empty(sequences: Iterable[Patched]) -> list[Patched]:
    sequences = list(sequences)
    if not sequences:
        raise ValueError("no sequences for a batch: give more documents, or shorter sequences")
    return sequences


def _with_first_patch_of_one(ids: np.ndarray, lengths: np.ndarray) -> Patched:
    """Splits off the first byte and drops the last patch, so the number of patches stays."""
    if lengths[0] == 1:
        return ids, lengths
    lengths = np.concatenate([[1, lengths[0] - 1], lengths[1:-1]])
    return ids[: lengths.sum()], lengths


def _fitted(lengths: np.ndarray, total: int) -> np.ndarray:
    """Cuts patch lengths int32 [P], or extends the last one, so that they sum to `total`."""
    ends = np.minimum(np.cumsum(lengths), total)
    ends[-1] = total
    return np.diff(ends, prepend=0).astype(np.int32)
