"""The tokens of a teacher as arrays of static shape, beside the patches of the same rows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.patching.buffers import PatchBuffers
from bltjax.patching.packed_rows import place_in_document
from bltjax.vocabulary import BYTE_OFFSET

Array = jax.Array
SPACE_ID = ord(" ") + BYTE_OFFSET
UNKNOWN = -2  # where a token begins whose first byte is in an earlier row


class TeacherTokens(NamedTuple):
    """The tokens that end in B rows of L bytes, in N columns; unused columns come last."""

    ids: Array  # int32 [B, N], of the teacher; 0 in unused columns
    begins: Array  # int32 [B, N], position of the first byte; UNKNOWN
    ends: Array  # int32 [B, N], position of the last byte; L in unused columns
    documents: Array  # int32 [B, N], document of that byte
    mask: Array  # bool [B, N], column is used
    follows: Array  # bool [B, N], the column before it has a token of the same document
    of_bytes: Array  # int32 [B, L], column of the token that a byte is of, N: none
    counts: Array  # int32 [B, L], tokens that end at a byte or before, at most N
    overflow: Array  # int32 [B], tokens without a column


def tokens_of_rows(
    marks: Array, tokens: Array, document_ids: Array, num_columns: int
) -> TeacherTokens:
    """Returns the tokens of rows in `num_columns` columns.

    marks: int32 [B, L], as `Row.teacher_tokens`. tokens, document_ids: int32 [B, L].
    """
    is_end = marks > 0
    counts = jnp.cumsum(is_end, axis=1, dtype=jnp.int32)
    columns = jnp.where(is_end, jnp.minimum(counts - 1, num_columns), num_columns)
    positions = jnp.broadcast_to(jnp.arange(marks.shape[1], dtype=jnp.int32), marks.shape)

    def placed(x):
        return sums_by_column(x, columns, num_columns)

    mask = placed(jnp.ones_like(marks)) > 0
    ends = jnp.where(mask, placed(positions), marks.shape[1])
    documents = take(document_ids, ends)
    before = jnp.concatenate([-jnp.ones_like(ends[:, :1]), ends[:, :-1]], axis=1)
    follows = mask & (before >= 0) & (take(document_ids, before) == documents)
    age, has_begun = place_in_document(tokens, document_ids)
    first = ends - take(age, ends)  # of its document: BOS, which may be a token of its own
    of_first = jnp.where(take(has_begun, ends), jnp.minimum(first + 1, ends), UNKNOWN)
    return TeacherTokens(
        ids=jnp.maximum(placed(marks) - 1, 0),
        begins=jnp.where(follows, before + 1, of_first),
        ends=ends,
        documents=documents,
        mask=mask,
        follows=follows,
        of_bytes=jnp.minimum(counts - is_end, num_columns),
        counts=jnp.minimum(counts, num_columns),
        overflow=jnp.maximum(counts[:, -1] - num_columns, 0),
    )


def latest_tokens(
    teacher: TeacherTokens, patches: PatchBuffers, documents: Array
) -> tuple[Array, Array]:
    """Returns the column of the last token that ends with each patch or before, and if it has one.

    int32 and bool [B, P]; only a token of the patch's document counts. documents: int32 [B, P].
    """
    last = patches.starts + patches.lengths - 1
    column = take(teacher.counts, last) - 1
    found = patches.mask & (column >= 0) & (last < teacher.counts.shape[1])
    column = jnp.maximum(column, 0)
    return column, found & (take(teacher.documents, column) == documents)


def same_bytes(
    teacher: TeacherTokens, patches: PatchBuffers, tokens: Array, column: Array, found: Array
) -> Array:
    """Returns which patches are the bytes of one token, bool [B, P].

    One space aside that the token has before them, and one that the patch has after them. column,
    found: from `latest_tokens`. tokens: int32 [B, L].
    """
    first, last = patches.starts, patches.starts + patches.lengths - 1
    begins, ends = take(teacher.begins, column), take(teacher.ends, column)

    def is_space(positions):
        return take(tokens, positions) == SPACE_ID

    same_first = (begins == first) | ((begins == first - 1) & is_space(begins))
    same_last = (ends == last) | ((ends == last - 1) & is_space(last))
    return found & same_first & same_last & (ends >= first)


def take(x: Array, places: Array) -> Array:
    """Returns x[b, places[b, n]] for x [B, M, ...], places int32 [B, N]; beyond an end: the end."""
    rows = jax.vmap(lambda row, i: row.at[i].get(mode="clip"))
    return rows(x, jnp.maximum(places, 0))


def sums_by_column(x: Array, columns: Array, num_columns: int) -> Array:
    """Sums x [B, L] by columns int32 [B, L], 0 to num_columns, of which the last is left out."""
    # A vmap over rows: a sharded batch needs no out_sharding, and rows never exchange data.
    row_sum = functools.partial(jax.ops.segment_sum, num_segments=num_columns + 1)
    return jax.vmap(row_sum)(x, columns)[:, :num_columns]
