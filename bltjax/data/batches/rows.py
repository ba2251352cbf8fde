"""Packed rows of documents, and the share of a row that is in use."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bltjax.vocabulary import PAD_ID


class Row(NamedTuple):
    """A packed row, or a stack of rows with a leading axis; L byte positions, P patches."""

    tokens: np.ndarray  # [L], ids; PAD_ID in the padding
    # [L], the id that follows in the same document, even if that is in a later row; else PAD_ID.
    targets: np.ndarray
    loss_mask: np.ndarray  # [L], True where there is a target that is to be learned
    document_ids: np.ndarray  # [L], from 0 in each row; padding has one more than the last
    source_ids: np.ndarray  # [L], number of the source in the corpus; 0 in the padding
    patch_lengths: np.ndarray  # [P], sum to L + 1; P is 0 in rows without patches
    # [L], 1 + the id of the teacher's token whose last byte is there, 0 where none ends; [0] in
    # rows without a teacher.
    teacher_tokens: np.ndarray = np.zeros(0, np.int32)


def utilisation(rows: Iterable[Row]) -> dict[str, float]:
    """Returns the used share of byte positions and of patches.

    byte_utilisation: share of byte positions that hold an id. patch_utilisation: share of patch
    columns that hold a patch of ids (the tail is none); absent for rows without patches. Raises
    ValueError if there are no rows.
    """
    counts = [
        (row.tokens != PAD_ID, np.count_nonzero(row.patch_lengths) - 1, row.patch_lengths.size)
        for row in rows
    ]
    if not counts:
        raise ValueError("there are no rows: give at least one document to the packer")
    is_id, real_patches, patches = zip(*counts, strict=True)
    shares = {"byte_utilisation": float(np.mean(is_id))}
    if sum(patches):
        shares["patch_utilisation"] = sum(real_patches) / sum(patches)
    return shares
