"""How many nats a token model needs for texts, whatever texts come with them.

Rows and batches are those of `evaluation.score`, so on CPU results are equal bit for bit in any
company. Bits are counted over bytes.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.config import TokenModelConfig
from bltjax.data.batches.rows import Row
from bltjax.data.tokenizer import Tokenizer
from bltjax.evaluation.continuations import ContinuationScore
from bltjax.evaluation.score import Score, byte_rows, raw_targets, run_rows, trim
from bltjax.evaluation.token_baseline.generate import drawable
from bltjax.model import functional
from bltjax.ops.cross_entropy import next_byte_nats
from bltjax.runtime.progress import OnProgress
from bltjax.vocabulary import PAD_ID


class _Text(NamedTuple):
    """Ids int32 [S], BOS first, and the first of them that is scored."""

    ids: np.ndarray
    first: int


def score_documents(
    config: TokenModelConfig,
    params,
    tokenizer: Tokenizer,
    documents: Sequence[bytes],
    row_tokens: int,
    on_progress: OnProgress,
) -> list[Score]:
    """The Score of each document, on the mesh that is set; its patches are ids, BOS and EOS too.

    A document of more than `row_tokens` ids goes on in further rows, without sight of the one
    before, as in training.
    """
    texts = [_Text(tokenizer.encode(document), 1) for document in documents]
    scores = []
    sums = _sums(config, params, tokenizer, texts, row_tokens, on_progress)
    for document, text, (nats, _) in zip(documents, texts, sums, strict=True):
        bits = nats / math.log(2) / len(document) if document else math.nan
        scores.append(Score(nats, len(document), len(text.ids), bits))
    return scores


def score_continuations(
    config: TokenModelConfig,
    params,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[bytes, bytes]],
    row_tokens: int,
    on_progress: OnProgress,
) -> list[ContinuationScore]:
    """The ContinuationScore of each (context, continuation), its ids found as lm-eval finds them.

    Those of both together, without as many as the context alone has; blanks at the end of the
    context are taken for the continuation's. num_bytes are those that were given. A context that is
    too long for a row keeps its last ids, with a warning.
    """
    texts = [_pair_text(tokenizer, *pair) for pair in pairs]
    cut = [_without_early_context(text, row_tokens) for text in texts]
    if num_cut := sum(len(a.ids) < len(b.ids) for a, b in zip(cut, texts, strict=True)):
        warnings.warn(
            f"{num_cut} of {len(texts)} contexts are cut to their last ids, as rows hold "
            f"{row_tokens}: give a larger row_bytes to keep them",
            stacklevel=3,
        )
    sums = _sums(config, params, tokenizer, cut, row_tokens, on_progress)
    return [
        ContinuationScore(nats, len(continuation), greedy)
        for (_, continuation), (nats, greedy) in zip(pairs, sums, strict=True)
    ]


def _pair_text(tokenizer: Tokenizer, context: bytes, continuation: bytes) -> _Text:
    kept = context.rstrip()
    ids = tokenizer.encode(context + continuation, add_eos=False)
    first = len(tokenizer.encode(kept, add_eos=False))
    if continuation:  # the two may join into fewer ids than the context has
        first = max(min(first, len(ids) - 1), 1)
    return _Text(ids, first)


def _without_early_context(text: _Text, row_tokens: int) -> _Text:
    """What fits a row; with a continuation that does not, half a row of context."""
    scored = len(text.ids) - text.first
    room = row_tokens - 1 - scored
    room = room if room >= 0 else row_tokens // 2
    begin = max(text.first - room, 1)
    return _Text(np.concatenate([text.ids[:1], text.ids[begin:]]), text.first - begin + 1)


def _sums(config, params, tokenizer, texts: list[_Text], row_tokens: int, on_progress):
    """(nats, whether all are greedy) of what is scored of each text."""
    nats, greedy = [[] for _ in texts], [True] * len(texts)
    lengths = tokenizer.byte_lengths(config.vocab_size)
    rows = (
        ((i, int(lengths[row.targets[row.loss_mask]].sum())), trim(row))
        for i, (text, packed) in enumerate(
            zip(texts, byte_rows((text.ids for text in texts), row_tokens), strict=True)
        )
        for row in _scored_rows(packed.rows, text.first)
    )
    step = functools.partial(_row_sums, len(tokenizer))
    for owners, _, (row_nats, row_greedy) in run_rows(step, config, params, rows):
        # A batch is filled up with rows that count nothing.
        for (i, _), value, all_greedy in zip(owners, row_nats, row_greedy, strict=False):
            nats[i].append(float(value))
            greedy[i] &= bool(all_greedy)
        if on_progress:
            on_progress(sum(num_bytes for _, num_bytes in owners))
    # Rows may come back in any order: fsum is exact, and the same in all.
    return zip(map(math.fsum, nats), greedy, strict=True)


def _scored_rows(rows: Iterable[Row], first: int) -> Iterator[Row]:
    """The rows that have a target with bytes among ids[first:], with only those in the mask."""
    position = 0  # in the text, of the row's first id
    for row in rows:
        at = position + 1 + np.arange(len(row.tokens))
        row = row._replace(loss_mask=raw_targets(row._asdict()) & (at >= first))
        if row.loss_mask.any():
            yield row
        position += np.count_nonzero(row.tokens != PAD_ID)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_sums(num_ids: int, config, params, batch):
    """Nats of each row's targets float32 [B], and whether all of them are greedy, bool [B]."""
    logits = functional.apply(config, params, batch["tokens"], batch["document_ids"])
    best = jnp.argmax(jnp.where(drawable(logits, num_ids), logits, -jnp.inf), axis=-1)
    counts = batch["loss_mask"]
    nats = jnp.sum(next_byte_nats(logits, batch["targets"]) * counts, axis=1)
    return nats, jnp.all((best == batch["targets"]) | ~counts, axis=1)
