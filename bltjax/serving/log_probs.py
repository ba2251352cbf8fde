"""Log-probabilities of bytes in the two forms that OpenAI's clients read.

An entry stands for one byte. Names of bytes are printable and unique, so that no two of them
collapse in a dict; the byte itself stands beside its name.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bltjax.serving.text import BOS_NAME, bytes_of_id, name_of_id
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET, is_drawable


class Entry(NamedTuple):
    """A byte of a text, how probable it was, and what was most probable in its place."""

    token: int  # its id; EOS_ID where the text ended there, BOS_ID before the first byte
    log_p: float | None  # nats below certainty; None: nothing was predicted
    top: list[tuple[int, float]]  # (id, log p), the most probable first
    offset: int  # of its character in the text, in characters


def entries(
    tokens: Sequence[int], log_p: np.ndarray, offsets: Iterable[int], num_top: int
) -> list[Entry]:
    """Returns an entry for each id; log_p: float32 [ids, num_ids], before each of them.

    Only what can be drawn, the bytes and EOS, is among the most probable.
    """
    ids = np.arange(log_p.shape[-1])
    drawable = np.where(is_drawable(ids, len(ids)), log_p, -np.inf)
    order = np.argsort(-drawable, axis=-1, kind="stable")[:, :num_top]
    return [
        Entry(int(token), float(row[token]), [(int(i), float(row[i])) for i in best], offset)
        for token, row, best, offset in zip(tokens, log_p, order, offsets, strict=True)
    ]


def unpredicted(token: int, offset: int) -> Entry:
    """Returns the entry of an id that nothing stands before."""
    return Entry(token, None, [], offset)


def of_completions(found: Sequence[Entry]) -> dict:
    """Returns the log-probabilities of a text as `/v1/completions` has them.

    `bytes` is an extension: the value of each byte, None for BOS and EOS.
    """
    return dict(
        tokens=[_name(entry.token) for entry in found],
        token_logprobs=[_finite(entry.log_p) for entry in found],
        top_logprobs=[_by_name(entry) for entry in found],
        text_offset=[entry.offset for entry in found],
        bytes=[e.token - BYTE_OFFSET if e.token >= BYTE_OFFSET else None for e in found],
    )


def of_chat(found: Sequence[Entry]) -> dict:
    """Returns the log-probabilities of a text as `/v1/chat/completions` has them."""
    content = [
        _described(entry.token, entry.log_p)
        | dict(top_logprobs=[_described(*pair) for pair in entry.top])
        for entry in found
    ]
    return dict(content=content, refusal=None)


def _described(token: int, log_p: float | None) -> dict:
    return dict(token=_name(token), logprob=_finite(log_p), bytes=bytes_of_id(token))


def _by_name(entry: Entry) -> dict | None:
    """Returns {name: log p} of the most probable and of the byte itself; None before the first."""
    if entry.log_p is None:
        return None
    return {_name(token): _finite(p) for token, p in [*entry.top, (entry.token, entry.log_p)]}


def _name(token: int) -> str:
    return BOS_NAME if token == BOS_ID else name_of_id(token)


def _finite(log_p: float | None) -> float | None:
    """Returns a number that JSON has; OpenAI gives -9999 for what is impossible."""
    return log_p if log_p is None else max(log_p, -9999.0)
