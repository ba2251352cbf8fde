"""How probable a continuation is after a context, and whether greedy decoding would write it.

What multiple-choice tasks are scored by. A pair is scored in a row of its own, as a document is in
`score.py`: on CPU its result is the same bit for bit in any company.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.config import BLTConfig, EntropyModelConfig, PatchingConfig
from bltjax.data.batches.rows import Row
from bltjax.evaluation.score import (
    ROW_BYTES,
    Packed,
    batch_logits,
    byte_rows,
    patched_rows,
    raw_targets,
    run_rows,
    trim,
)
from bltjax.ops.cross_entropy import next_byte_nats
from bltjax.runtime.progress import OnProgress
from bltjax.vocabulary import PAD_ID, encode, is_drawable

Text = str | bytes


class ContinuationScore(NamedTuple):
    """What a continuation costs after its context."""

    nats: float  # -log p of its bytes, given BOS, the context and the bytes before
    num_bytes: int
    is_greedy: bool  # each byte is the most probable of what can be drawn: the bytes and EOS


def score_continuations(
    config: BLTConfig,
    params,
    entropy_config: EntropyModelConfig | None,
    entropy_params,
    patching: PatchingConfig,
    pairs: Sequence[tuple[Text, Text]],
    *,
    row_bytes: int = ROW_BYTES,
    on_progress: OnProgress = None,
) -> list[ContinuationScore]:
    """The ContinuationScore of each (context, continuation) under a byte latent transformer.

    Patches are those of BOS + context + continuation; no boundary depends on a later byte, so none
    tells of what is to be predicted. Where a pair is longer than a row, the context keeps its last
    bytes, with a warning; a continuation that is longer than a row by itself goes on in further
    rows, as a document does, after half a row of context. `on_progress` is told the number of
    continuation bytes of each batch that is done. Raises ValueError for pairs that are none, for a
    missing entropy model and for `row_bytes` below 8.
    """
    texts = _texts(pairs, row_bytes)
    ids = (text.ids for text in texts)
    packed = patched_rows(entropy_config, entropy_params, patching, ids, row_bytes)
    return _scores(config, params, packed, texts, on_progress)


def score_continuations_bytes(
    config: EntropyModelConfig,
    params,
    pairs: Sequence[tuple[Text, Text]],
    *,
    row_bytes: int = ROW_BYTES,
    on_progress: OnProgress = None,
) -> list[ContinuationScore]:
    """The same under a byte model without patches; see `score_continuations`."""
    texts = _texts(pairs, row_bytes)
    packed = byte_rows((text.ids for text in texts), row_bytes)
    return _scores(config, params, packed, texts, on_progress)


class _Text(NamedTuple):
    """BOS + context + continuation, int32 [S], and where the continuation begins."""

    ids: np.ndarray
    first: int

    @property
    def num_bytes(self) -> int:
        return len(self.ids) - self.first


def _texts(pairs: Sequence[tuple[Text, Text]], row_bytes: int) -> list[_Text]:
    """The pairs as ids, contexts cut to what a row holds. Raises ValueError for other things."""
    if row_bytes < 8:
        raise ValueError(f"row_bytes={row_bytes} must be at least 8")
    texts, num_cut = [], 0
    for i, pair in enumerate(pairs):
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not (is_pair and all(isinstance(x, Text) for x in pair)):
            raise ValueError(f"pairs[{i}] is {pair!r}: give (context, continuation), str or bytes")
        context, continuation = (encode(x, add_bos=False, add_eos=False) for x in pair)
        # A row holds BOS, and one place less than its length whatever the patches.
        room = row_bytes - 2 - len(continuation)
        if room < 0:
            room = row_bytes // 2
        kept = context[max(len(context) - room, 0) :]
        num_cut += len(kept) < len(context)
        ids = np.concatenate([encode(b"", add_eos=False), kept, continuation])
        texts.append(_Text(ids, len(kept) + 1))
    if num_cut:
        warnings.warn(
            f"{num_cut} of {len(texts)} contexts are cut to their last bytes, as rows hold "
            f"{row_bytes}: give a larger row_bytes to keep them",
            stacklevel=4,
        )
    return texts


def _scores(config, params, packed: Iterable[Packed], texts: list[_Text], on_progress):
    nats = [[] for _ in texts]
    is_greedy = [True] * len(texts)
    rows = (
        (i, trim(row))
        for i, (text, document) in enumerate(zip(texts, packed, strict=True))
        for row in _continuation_rows(document.rows, text.first)
    )
    for owners, num_bytes, (row_nats, row_greedy) in run_rows(_sums, config, params, rows):
        # A batch is filled up with rows that count nothing.
        for owner, value, greedy in zip(owners, row_nats, row_greedy, strict=False):
            nats[owner].append(float(value))
            is_greedy[owner] &= bool(greedy)
        if on_progress:
            on_progress(num_bytes)
    # Rows may come back in any order: fsum is exact, and the same in all.
    return [
        ContinuationScore(math.fsum(values), text.num_bytes, greedy)
        for values, text, greedy in zip(nats, texts, is_greedy, strict=True)
    ]


def _continuation_rows(rows: Iterable[Row], first: int) -> Iterator[Row]:
    """The rows that have a target among ids[first:], with only those in the loss mask."""
    position = 0  # in the document, of the row's first token
    for row in rows:
        targets_at = position + 1 + np.arange(len(row.tokens))
        loss_mask = row.loss_mask & (targets_at >= first)
        if loss_mask.any():
            yield row._replace(loss_mask=loss_mask)
        position += np.count_nonzero(row.tokens != PAD_ID)


@functools.partial(jax.jit, static_argnums=0)
def _sums(config, params, batch):
    """Nats of each row's targets float32 [B], and whether all of them are greedy, bool [B]."""
    logits, counts = batch_logits(config, params, batch), raw_targets(batch)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    best = jnp.argmax(jnp.where(is_drawable(ids), logits, -jnp.inf), axis=-1)
    nats = jnp.sum(next_byte_nats(logits, batch["targets"]) * counts, axis=1)
    return nats, jnp.all((best == batch["targets"]) | ~counts, axis=1)
