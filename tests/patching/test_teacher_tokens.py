"""Tokens and patches of packed rows against plain Python."""

import functools

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

from bltjax.config import PatchingConfig
from bltjax.data.batches.packing import OpenDocument, Packer, patch_ends
from bltjax.model.blt import patch_documents
from bltjax.patching.boundaries import patch_starts
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.patching.teacher_tokens import latest_tokens, same_bytes, tokens_of_rows
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET, encode

L, P, N = 24, 24, 12
SPACE = ord(" ") + BYTE_OFFSET


@functools.partial(jax.jit, static_argnums=0)
def computed(num_columns, row):
    patches = buffers_from_lengths(row["patch_lengths"], L)
    made = tokens_of_rows(row["teacher_tokens"], row["tokens"], row["document_ids"], num_columns)
    documents = patch_documents(row["tokens"], row["document_ids"], patches.starts)
    column, found = latest_tokens(made, patches, documents)
    return made, column, found, same_bytes(made, patches, row["tokens"], column, found)


def spans(row):
    """(id, first byte or None, last byte, document, whether one of its document is before it)."""
    found, begin, document = [], None, None
    for i, mark in enumerate(row.teacher_tokens):
        if row.document_ids[i] != document:
            document, follows = row.document_ids[i], False
            begin = i + 1 if row.tokens[i] == BOS_ID else None
        if mark:
            first = i if row.tokens[i] == BOS_ID else begin
            found.append((mark - 1, first, i, document, follows))
            begin, follows = i + 1, True
    return found


def of_patches(row, tokens):
    """For each patch of bytes: the number of its last token or None, and if the bytes are one."""
    found, first = [], 0
    for length in row.patch_lengths[: np.count_nonzero(row.patch_lengths) - 1]:
        last = first + length - 1
        ended = [
            n for n, t in enumerate(tokens) if t[2] <= last and t[3] == row.document_ids[first]
        ]
        number = ended[-1] if ended else None
        same = False
        if ended and tokens[number][1] is not None:
            _, begin, end, _, _ = tokens[number]
            spaced = range(begin, first) if begin < first else range(0)
            after = range(end + 1, last + 1)
            extra = [*spaced, *after]
            same = (
                begin <= first <= end and begin >= first - 1 and len(after) <= 1
                and all(row.tokens[i] == SPACE for i in extra)
            )  # fmt: skip
        found.append((number, same))
        first += length
    return found


TEXT = st.text("a ", min_size=1, max_size=30)


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.lists(TEXT, min_size=1, max_size=3), st.data())
def test_tokens_of_patches_are_those_of_plain_python(texts, data):
    columns = data.draw(st.sampled_from([N, L]))
    rows = list(packed(texts, data))
    for row in rows:
        tokens, batch = spans(row), {k: v[None] for k, v in row._asdict().items()}
        made, column, found, same = jax.tree.map(np.asarray, computed(columns, batch))
        assert made.overflow[0] == max(len(tokens) - columns, 0)
        kept = tokens[:columns]
        assert made.mask[0].sum() == len(kept)
        for n, (number, begin, end, document, follows) in enumerate(kept):
            assert (made.ids[0, n], made.ends[0, n]) == (number, end)
            assert made.begins[0, n] == (-2 if begin is None else begin)
            assert (made.documents[0, n], made.follows[0, n]) == (document, follows)
        if len(tokens) > columns:
            continue
        for j, (number, expected) in enumerate(of_patches(row, tokens)):
            assert found[0, j] == (number is not None)
            if number is not None:
                assert column[0, j] == number
            assert same[0, j] == expected


def packed(texts, data):
    """Rows of texts with patches and tokens that end anywhere; BOS is one where that is drawn."""
    documents = []
    for text in texts:
        ids = encode(text)
        marks = np.zeros(len(ids), np.int32)
        of_text = dict(min_size=len(text), max_size=len(text))
        marks[1:-1] = data.draw(st.lists(st.sampled_from([0, 3, 7]), **of_text))
        marks[-2] = 5
        marks[0] = data.draw(st.sampled_from([0, 9]))
        starts = np.array([True, *data.draw(st.lists(st.booleans(), **of_text)), False])
        starts[1] = True
        documents.append(OpenDocument(ids, patch_ends(ids, starts), teacher_tokens=marks))
    packer, stream = Packer(L, P, pool=2), iter(documents)
    return iter(functools.partial(packer.next_row, stream), None)


def test_a_word_and_the_space_after_it_are_a_token_with_the_space_before():
    text = b"one two, three four."
    # The last bytes of "one", " two", ",", " three", " four", ".".
    ids, ends = encode(text), [2, 6, 7, 13, 18, 19]
    marks = np.zeros(len(ids), np.int32)
    for number, end in enumerate(ends):
        marks[end + 1] = number + 10
    starts = patch_starts(PatchingConfig("space"), ids)[: len(ids)]
    document = OpenDocument(ids, patch_ends(ids, starts), teacher_tokens=marks)
    row = Packer(L, P).next_row(iter([document]))
    batch = {k: v[None] for k, v in row._asdict().items()}
    made, column, _, same = jax.tree.map(np.asarray, computed(N, batch))
    first, told = 0, {}
    for j, length in enumerate(row.patch_lengths):
        piece = bytes(int(x) - BYTE_OFFSET for x in row.tokens[first : first + length] if x >= 4)
        if same[0, j]:
            told[piece] = int(made.ids[0, column[0, j]])
        first += length
    assert told == {b"one ": 9, b" three ": 12}
