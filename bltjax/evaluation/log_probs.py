"""Log-probabilities of every id after every byte of a text, by teacher forcing."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from bltjax.evaluation.score import ByteScoring, batch_logits, fitting_length, run_rows
from bltjax.vocabulary import TEXT, as_list, text_bytes

LAST = b"\n"  # stands for the byte to come: no prediction and no patch depends on a later byte


def next_byte_log_probs(model: ByteScoring, documents: Sequence[bytes | str]) -> list[np.ndarray]:
    """Returns float32 [bytes + 1, num_ids] of each document under a model of bytes.

    Row i is log p of the id after BOS and the first i bytes; the last row is of what would follow.
    A document is one row, however long it is. Where the model was trained on rows as long,
    the negative sum over bytes is what `score_continuations` gives for ("", document). Raises
    ValueError for documents that are not a list of bytes or str.
    """
    documents = as_list("documents", documents)
    for i, document in enumerate(documents):
        if not isinstance(document, TEXT):
            raise ValueError(f"documents[{i}] is {type(document).__name__}: give bytes or str")
    documents = [text_bytes(document) for document in documents]
    ids = [model.encode_pair(b"", document + LAST)[0] for document in documents]
    longest = fitting_length(max(map(len, ids), default=1) + 1)
    step = functools.partial(_row_log_probs, model.num_ids)
    _, results = run_rows(step, model, ids, [1] * len(ids), longest, None)
    return [row[: len(d) + 1] for d, (row,) in zip(documents, results, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_log_probs(num_ids: int, config, params, batch):
    """Returns log p of the ids after each position: float32 [B, L, num_ids]."""
    return jax.nn.log_softmax(batch_logits(config, params, batch))[..., :num_ids]
