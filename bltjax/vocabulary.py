"""Converts bytes to ids and back: four special ids, then 256 byte values (model.md#bytes)."""

import contextlib
import re
from collections.abc import Iterable

import numpy as np

PAD_ID = 0  # Published as BOE, "beginning of example", which nothing uses; here it is padding.
BOS_ID = 1
EOS_ID = 2
BPE_ID = 3  # Ends a patch in the "bpe" patching rule; never emitted by `encode`.
BYTE_OFFSET = 4  # Byte value b has id b + BYTE_OFFSET.
VOCAB_SIZE = BYTE_OFFSET + 256
MASK_ID = -1  # In blocks that a decoder fills in: a byte to be found; no model predicts it.
TEXT = bytes, bytearray, memoryview, str  # types of a text
_NO_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that escape no byte


def is_drawable(ids, num_ids: int = VOCAB_SIZE):
    """Returns which of `ids` a model may write: those with bytes, and the EOS that ends a text."""
    return ((ids >= BYTE_OFFSET) & (ids < num_ids)) | (ids == EOS_ID)


def text_bytes(text: bytes | str) -> bytes:
    """Returns the bytes of a text; a str is encoded as UTF-8.

    Its surrogate escapes (PEP 383) are the bytes that they stand for: in such a str Python gives
    arguments and file names that are no UTF-8, or all that are not ASCII in a C locale. Other lone
    surrogates, which stand for nothing, are dropped, as published.
    """
    if isinstance(text, str):
        return _NO_BYTES.sub("", text).encode("utf-8", "surrogateescape")
    return text if isinstance(text, bytes) else bytes(memoryview(text))


def as_list(name: str, values: Iterable) -> list:
    """Returns the values of a list, tuple, array or iterator, whose order is that of the results.

    Raises ValueError for one text, a set or dict, and what has no values.
    """
    if not isinstance(values, (*TEXT, set, frozenset, dict)):
        with contextlib.suppress(TypeError):
            return list(iter(values))
    raise ValueError(f"{name} is one {type(values).__name__}: give a list of {name}")


def encode(text: bytes | str, add_bos: bool = True, add_eos: bool = True) -> np.ndarray:
    """Returns the ids int32 [S] of a document.

    Any bytes are valid text; a str is that of `text_bytes`.
    """
    ids = np.frombuffer(text_bytes(text), np.uint8).astype(np.int32) + BYTE_OFFSET
    return np.pad(ids, (int(add_bos), int(add_eos)), constant_values=(BOS_ID, EOS_ID))


def decode(ids, cut_at_eos: bool = False) -> bytes:
    """Returns the bytes of ids [S], special and negative ids dropped; inverts `encode`.

    With `cut_at_eos`, ids after the first EOS are ignored. Raises ValueError for ids past the
    vocabulary.
    """
    ids = np.asarray(ids, np.int64)
    if cut_at_eos and (ids == EOS_ID).any():
        ids = ids[: np.argmax(ids == EOS_ID)]
    if (ids >= VOCAB_SIZE).any():
        raise ValueError(
            f"id {ids.max()} is past the byte vocabulary: valid ids are below {VOCAB_SIZE}"
        )
    return (ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()
