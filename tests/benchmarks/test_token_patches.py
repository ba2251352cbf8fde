"""Patches of tokens: in whole documents, in rows that cut them, and that records keep them."""

import functools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from benchmarks import token_patches
from bltjax.config import DataConfig
from bltjax.data import tokenizer
from bltjax.data.batches.lanes import Lane, Layout
from bltjax.data.batches.order import InOrder
from bltjax.data.records import store as records
from bltjax.data.teacher_tokens import TeacherTokenizer
from bltjax.patching.boundaries import lengths_from_starts, patch_starts
from bltjax.vocabulary import BOS_ID, EOS_ID, PAD_ID, decode, encode

pytest.importorskip("tokenizers", reason="the extra tokens")
TEXT = "the patch, the patch and the byte: 12 naïve words\n  x = y\n\n日本 日本 日本\n" * 3


@functools.cache
def tokens(vocab_size=300, bos=None) -> TeacherTokenizer:
    return TeacherTokenizer(tokenizer.train([TEXT.encode()], vocab_size).text, bos)


def pieces(data: bytes) -> list[bytes]:
    """The tokens of a text by their own bytes; those of bytes that are no UTF-8 are one byte."""
    ids, _ = tokens().encode(data)
    return [tokens().pieces[i] for i in ids.tolist()]


PARTS = st.one_of(
    st.text(max_size=5).map(str.encode),
    st.binary(max_size=4),
    st.sampled_from([b"the patch", b"   ", b"\n\n", b"\r\n  x", "naïve 日本".encode(), b"\xe6"]),
)


@hypothesis.given(st.lists(PARTS, max_size=8).map(b"".join), st.sampled_from([None, 1]))
def test_patches_are_tokens_between_bos_and_eos(data, bos):
    ids = encode(data)
    entropies = token_patches.entropies_of(tokens(bos=bos), data)
    starts = patch_starts(token_patches.PATCHING, ids, entropies)[: len(ids)]
    ends = np.cumsum(lengths_from_starts(starts))
    found = [decode(patch) for patch in np.split(ids, ends[:-1])[1:-1]]
    assert ids[0] == BOS_ID and ids[-1] == EOS_ID
    assert ends[0] == 1 and ends[-2] == len(ids) - 1
    assert found == pieces(data)


def test_the_texts_have_tokens_of_many_bytes():
    """Else the test above would hold of patches of one byte."""
    found = pieces(TEXT.encode())
    assert {b" patch", b"\n", b" ", "日本".encode()} <= set(found)


def corpus(directory) -> DataConfig:
    """Documents shorter and longer than a row, some of them empty, or cut inside a character."""
    directory.mkdir()
    texts = ["", "a", "the patch and the byte\n", TEXT, "日本 naïve" * 9, " " * 90, TEXT * 2]
    for i, text in enumerate(texts * 3):
        (directory / f"{i}.txt").write_bytes(text.encode()[: len(text.encode()) - i // 7])
    return DataConfig(root=str(directory), shard_bytes=500, validation_fraction=0.3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Settings of a corpus, and the directory of its records."""
    top = tmp_path_factory.mktemp("tokens")
    data = corpus(top / "corpus")
    token_patches.record(top / "records", data, tokens())
    return data, top / "records"


def patches_of(row) -> list[tuple[int, list[int]]]:
    """The document in its row and the ids of each patch."""
    ends = np.cumsum(row.patch_lengths)
    spans = zip(ends - row.patch_lengths, ends, strict=True)
    return [
        (row.document_ids[a], row.tokens[a:b].tolist())
        for a, b in spans
        if b > a and a < len(row.tokens) and row.tokens[a] != PAD_ID
    ]


@pytest.mark.parametrize("part", records.PARTS)
@pytest.mark.parametrize("row_bytes, row_patches", [(32, 12), (40, 40), (24, 5)])
def test_rows_have_the_tokens_of_their_documents_for_patches(made, part, row_bytes, row_patches):
    """Where a row begins inside a document its first patch is split, as under any rule."""
    shards = records.open_store(made[1]).shards(part=part)
    documents = InOrder([records.Documents(shards, entropies=True)])
    layout = Layout(row_bytes, row_patches, token_patches.PATCHING, pool=1, teacher=tokens())
    found, open_document = [], []
    for row in Lane(documents, layout, 0, 1):
        patches = patches_of(row)
        if patches[0][1][0] != BOS_ID and len(patches) > 1 and patches[1][0] == patches[0][0]:
            (document, first), (_, second), *rest = patches
            is_split = len(first) == 1 and row.teacher_tokens[0] == 0
            patches = [(document, first + second), *rest] if is_split else patches
        for _, ids in patches:
            open_document.append(ids)
            if ids[-1] == EOS_ID:
                found.append(open_document)
                open_document = []
        ends = np.cumsum(row.patch_lengths) - 1
        inside = (row.tokens != PAD_ID) & (row.tokens != BOS_ID) & (row.tokens != EOS_ID)
        assert set(np.flatnonzero(row.teacher_tokens)) <= set(ends[ends < row_bytes])
        assert row.teacher_tokens[~inside].max(initial=0) == 0
    expected = [document.data for document in records.Documents(shards)]
    assert not open_document and len(found) == len(expected)
    for patches, data in zip(found, expected, strict=True):
        assert patches[0] == [BOS_ID] and patches[-1] == [EOS_ID]
        assert list(map(decode, patches[1:-1])) == pieces(data)


def test_records_go_on_where_they_stopped_and_are_of_one_tokenizer(made):
    data, directory = made
    store = records.open_store(directory)
    shards = store.all_shards
    assert len(shards) > 3 and not records.without_entropies(directory, shards)
    before = [shard.entropies_path.read_bytes() for shard in shards]
    shards[1].entropies_path.unlink()
    token_patches.record(directory, data, tokens())
    assert [shard.entropies_path.read_bytes() for shard in shards] == before
    with pytest.raises(ValueError, match=r"are of another model: model\.ends_of_tokens: "):
        token_patches.record(directory, data, tokens(vocab_size=290))
