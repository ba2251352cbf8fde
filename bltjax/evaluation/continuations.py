"""The cost of a continuation after a context, and whether greedy decoding would write it.

Multiple-choice tasks are scored by it. A pair is scored in a row of its own, as a document is in
`score.py`: on CPU its result is the same bit for bit in any company.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.evaluation.score import (
    ROW_BYTES,
    ByteScoring,
    batch_logits,
    check_row,
    raw_targets,
    run_rows,
)
from bltjax.ops.cross_entropy import next_byte_nats
from bltjax.runtime.progress import OnProgress
from bltjax.runtime.terminal import short
from bltjax.vocabulary import TEXT, as_list, is_drawable, text_bytes


class ContinuationScore(NamedTuple):
    """Cost of a continuation after its context."""

    nats: float  # -log p of its bytes, given BOS, the context and the bytes before
    num_bytes: int
    is_greedy: bool  # each id is the most probable of those that can be drawn


def score_continuations(
    model: ByteScoring,
    pairs: Sequence[tuple[bytes | str, bytes | str]],
    *,
    row_bytes: int = ROW_BYTES,
    on_progress: OnProgress = None,
) -> list[ContinuationScore]:
    """Returns the ContinuationScore of each (context, continuation) under a model.

    Patches are those of BOS + context + continuation; no boundary depends on a later byte, so none
    tells of what is to be predicted. Where a pair is longer than a row, the context keeps its last
    ids, with a warning; a continuation that is longer than a row by itself goes on in further
    rows, as a document does, after half a row of context. `on_progress` is told the number of
    continuation bytes of each batch that is done. Raises ValueError for pairs that are none, for a
    missing entropy model and for `row_bytes` below 8.
    """
    check_row(row_bytes)
    pairs = [_bytes_of(i, pair) for i, pair in enumerate(as_list("pairs", pairs))]
    texts, num_cut = [], 0
    for pair in pairs:
        ids, first = model.encode_pair(*pair)
        free = row_bytes - 1 - model.spare - (len(ids) - first)  # beside BOS and the continuation
        begin = max(first - (free if free >= 0 else row_bytes // 2), 1)
        texts.append((np.concatenate([ids[:1], ids[begin:]]), first - begin + 1))
        num_cut += begin > 1
    if num_cut:
        warnings.warn(
            f"{num_cut} of {len(texts)} contexts are cut to their last ids, as rows hold "
            f"{row_bytes}: give a larger row_bytes to keep them",
            stacklevel=3,
        )
    ids, firsts = zip(*texts, strict=True) if texts else ((), ())
    step = functools.partial(_row_sums, model.num_ids)
    _, results = run_rows(step, model, ids, firsts, row_bytes, on_progress)
    # Rows may come back in any order: fsum is exact, and the same in all.
    return [
        ContinuationScore(
            math.fsum(nats for nats, _ in rows),
            len(continuation),
            all(bool(is_greedy) for _, is_greedy in rows),
        )
        for (_, continuation), rows in zip(pairs, results, strict=True)
    ]


def _bytes_of(i: int, pair) -> tuple[bytes, ...]:
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not (is_pair and all(isinstance(x, TEXT) for x in pair)):
        raise ValueError(f"pairs[{i}] is {short(pair)}: give (context, continuation), str or bytes")
    return tuple(map(text_bytes, pair))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_sums(num_ids: int, config, params, batch):
    """Returns nats of each row's targets float32 [B], and whether all are greedy, bool [B]."""
    logits, counts = batch_logits(config, params, batch), raw_targets(batch)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    can_be_drawn = jnp.where(is_drawable(ids, num_ids), logits, -jnp.inf)
    best = jax.lax.argmax(can_be_drawn, 2, jnp.int32)
    nats = jnp.sum(next_byte_nats(logits, batch["targets"]), axis=1, where=counts)
    return nats, jnp.all((best == batch["targets"]) | ~counts, axis=1)
