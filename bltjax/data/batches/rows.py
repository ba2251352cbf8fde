"""Packed rows of documents, stacks of them, and the share of a row that is in use."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bltjax.vocabulary import PAD_ID


class Row(NamedTuple):
    """A packed row, or a stack of rows with a leading axis; L byte positions, P patches."""

    tokens: np.ndarray  # [L], ids; PAD_ID in the padding
    # [L], the id that follows in the same document, even if that is in a later row; else PAD_ID.
    targets: np.ndarray
    loss_mask: np.ndarray  # [L], True where there is a target
    document_ids: np.ndarray  # [L], from 0 in each row; padding has one more than the last
    source_ids: np.ndarray  # [L], number of the source in the corpus; 0 in the padding
    patch_lengths: np.ndarray  # [P], sum to L + 1; P is 0 in rows without patches


def stack(rows: Iterable[Row]) -> Row:
    """Stacks rows along a leading axis, in compact types for keeping many in memory.

    tokens and targets uint16 [R, L], loss_mask bool [R, L], document_ids int32 [R, L], source_ids
    uint16 [R, L], patch_lengths int32 [R, P]: 11 bytes a position and 4 a patch. Raises ValueError
    if there are no rows.
    """
    fields = list(zip(*rows, strict=True))
    if not fields:
        raise ValueError("no rows to stack: give at least one document to the packer")
    dtypes = Row(np.uint16, np.uint16, np.bool_, np.int32, np.uint16, np.int32)
    pairs = zip(fields, dtypes, strict=True)
    return Row(*(np.stack(field).astype(dtype) for field, dtype in pairs))


def utilisation(rows: Row | Iterable[Row]) -> dict[str, float]:
    """Returns the used share of byte positions and of patches, for rows or the result of `stack`.

    byte_utilisation: share of byte positions that hold an id. patch_utilisation: share of patch
    columns that hold a patch of ids (the tail is none); absent for rows without patches. Raises
    ValueError if there are no rows.
    """
    stacked = rows if isinstance(rows, Row) else stack(rows)
    shares = {"byte_utilisation": float(np.mean(stacked.tokens != PAD_ID))}
    lengths = np.atleast_2d(stacked.patch_lengths)
    if lengths.size:
        real_patches = np.count_nonzero(lengths) - len(lengths)
        shares["patch_utilisation"] = float(real_patches / lengths.size)
    return shares
