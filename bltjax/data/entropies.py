"""Entropies of a corpus under a trained entropy model, computed once and stored.

Documents go through the model in windows of one static shape. A window starts with enough of
what came before that every kept entropy is the one a pass over the whole document would give: a
byte's entropy depends on num_layers * (window - 1) earlier bytes and no more.
"""

import time
from collections.abc import Sequence

import jax
import numpy as np

from bltjax import sharding
from bltjax.config import EntropyModelConfig
from bltjax.model import functional
from bltjax.patching.boundaries import document_segments, newline_segments
from bltjax.patching.entropy import next_byte_entropy
from bltjax.vocabulary import PAD_ID


def make_entropy_fn(config: EntropyModelConfig, reset_at_newlines: bool = False):
    """jitted (params, tokens int32 [B, L]) -> entropies float32 [B, L] in nats (spec 2.2)."""
    segments = newline_segments if reset_at_newlines else document_segments

    @jax.jit
    def entropies(params, tokens):
        tokens = sharding.shard_rows(tokens)
        return next_byte_entropy(functional.apply(config, params, tokens, segments(tokens)))

    return entropies


def corpus_entropies(
    entropy_fn,
    params,
    config: EntropyModelConfig,
    documents: Sequence[np.ndarray],
    row_bytes: int,
    batch_size: int,
    report=print,
) -> list[np.ndarray]:
    """float16 entropies [S] of each document's ids [S]; entry i is the uncertainty after id i.

    `row_bytes` positions and `batch_size` rows are the one shape that is compiled. `report` gets a
    progress line every ten seconds.
    """
    receptive = config.transformer.num_layers * (config.transformer.window - 1)
    if row_bytes < 2 * receptive:
        raise ValueError(
            f"row_bytes={row_bytes} is too short for exact entropies: the model looks "
            f"back {receptive} bytes, use at least {2 * receptive}"
        )
    results = [np.empty(len(ids), np.float16) for ids in documents]
    spans = [
        span
        for i, ids in enumerate(documents)
        for span in _spans(i, len(ids), row_bytes, receptive)
    ]
    started = reported = time.perf_counter()
    total, done = sum(len(ids) for ids in documents), 0
    for first in range(0, len(spans), batch_size):
        group = spans[first : first + batch_size]
        tokens = np.full((batch_size, row_bytes), PAD_ID, np.int32)
        for row, (i, start, _, stop) in enumerate(group):
            tokens[row, : stop - start] = documents[i][start:stop]
        values = np.asarray(entropy_fn(params, sharding.put_batch(tokens)))
        for row, (i, start, keep, stop) in enumerate(group):
            results[i][keep:stop] = values[row, keep - start : stop - start]
            done += stop - keep
        now = time.perf_counter()
        if now - reported > 10 or first + batch_size >= len(spans):
            rate = done / (now - started)
            report(
                f"entropies {done / 1e6:.1f}/{total / 1e6:.1f} MB | {rate / 1e3:.0f} KB/s | "
                f"eta {(total - done) / rate:.0f}s"
            )
            reported = now
    return results


def _spans(document: int, length: int, row_bytes: int, receptive: int):
    """(document, start, first kept, stop) of the windows that cover a document."""
    yield document, 0, 0, min(length, row_bytes)
    keep = row_bytes
    while keep < length:
        start = keep - receptive
        yield document, start, keep, min(length, start + row_bytes)
        keep = start + row_bytes
