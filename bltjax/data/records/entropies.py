"""Computes the entropies of a corpus with a trained entropy model, and stores them.

Documents are cut into spans, which are packed into rows of one static shape. Spans in a row do not
see each other, since each EOS starts a new context. A span from the middle of a document begins
num_layers * (window - 1) bytes early, the most that an entropy can depend on, so each entropy that
is kept equals the one of a pass over the whole document.
"""

import bisect
import collections
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from bltjax import sharding
from bltjax.config import EntropyModelConfig
from bltjax.data.records.shards import (
    Documents,
    Shard,
    has_entropies,
    without_entropies,
    write_entropies,
)
from bltjax.data.sources.readers import in_chunks
from bltjax.model import functional
from bltjax.runtime.files import share
from bltjax.runtime.progress import progress_bar
from bltjax.vocabulary import EOS_ID, PAD_ID, encode

ROWS_PER_DEVICE = 4  # at a time
GROUP_IDS = 4_000_000  # ids of documents in memory at a time: 16 MB, and as much of entropies


class TrainedModel(NamedTuple):
    """An entropy model, its parameters on the host, and what else decides about its results."""

    config: EntropyModelConfig
    params: dict
    reset_at_newlines: bool
    row_bytes: int
    claim: str  # what `claim_entropies` returned


class _Span(NamedTuple):
    """Ids [start, stop) of a document, whose entropies [keep, stop) are kept."""

    document: int
    start: int
    keep: int
    stop: int


_Row = list[tuple[int, _Span]]  # (first position in the row, span)


def make_entropy_fn(config: EntropyModelConfig, reset_at_newlines: bool = False):
    """Returns a jitted (params, tokens int32 [B, L]) -> entropies float32 [B, L] in nats."""
    return jax.jit(
        lambda params, tokens: functional.entropies(config, params, tokens, reset_at_newlines)
    )


def receptive_bytes(config: EntropyModelConfig) -> int:
    """Returns the number of earlier bytes that an entropy can depend on."""
    return config.transformer.num_layers * (config.transformer.window - 1)


class Computer:
    """Computes the entropies of shards on the devices of this process.

    A device gets rows of one shape and no more than rows, on any mesh: so the entropies are the
    same bits wherever they are computed.
    """

    def __init__(self, model: TrainedModel):
        self._model, self._mesh = model, sharding.local_mesh()
        self._entropy_fn = make_entropy_fn(model.config, model.reset_at_newlines)
        with jax.set_mesh(self._mesh):
            self._params = sharding.put_whole(model.params)

    def add(self, store, shards: Sequence[Shard]):
        """Does what `add_entropies` does."""
        model, rows = self._model, ROWS_PER_DEVICE * sharding.num_row_shards(self._mesh)
        shape = model.config, model.row_bytes, rows
        with jax.set_mesh(self._mesh):
            add_entropies(store, shards, self._entropy_fn, self._params, *shape, model.claim)

    def compilations(self) -> int:
        """Returns how often the model was compiled."""
        return self._entropy_fn._cache_size()


def add_entropies(
    store,
    shards: Sequence[Shard],
    entropy_fn,
    params,
    config: EntropyModelConfig,
    row_bytes: int,
    batch_size: int,
    model: str = "",
) -> None:
    """Computes and writes the entropies of those shards of a records.Store that have none.

    Several processes may do so at once, and one that is killed loses one shard at most (see
    `files.share`). Results depend on the shard, the model and the shape of batches alone. model:
    what `claim_entropies` returned. Raises ValueError as `corpus_entropies` does.
    """
    missing = without_entropies(store.directory, shards)
    # Processes take shards in one order: what lies before this one's is done or being done.
    ends = itertools.accumulate(shard.num_bytes for shard in missing)
    end_of = {shard.stem: end for shard, end in zip(missing, ends, strict=True)}
    bar = progress_bar("entropies", sum(shard.num_bytes for shard in missing))

    def values(shard):
        ids = (encode(document.data) for document in Documents([shard]))
        for group in in_chunks(ids, len, GROUP_IDS):
            yield from corpus_entropies(
                entropy_fn, params, config, group, row_bytes, batch_size, share_rows=True
            )

    def compute(shard):
        write_entropies(shard, values(shard), model)
        bar.update(max(end_of[shard.stem] - bar.n, 0))

    share(missing, has_entropies, compute, store.lock)
    bar.close()


def corpus_entropies(
    entropy_fn,
    params,
    config: EntropyModelConfig,
    documents: Sequence[np.ndarray],
    row_bytes: int,
    batch_size: int,
    share_rows: bool = False,
) -> list[np.ndarray]:
    """Returns float32 entropies [S], in nats, for each document's ids [S].

    Entry i is the entropy of the prediction of the id after id i.

    row_bytes, batch_size: the only shape that is compiled. share_rows: spans of several documents
    may share a row, which is faster for short documents; their entropies then depend in the last
    bits on the other documents, since positions in the row differ. The same list of documents
    always gives the same bits.

    Raises ValueError where a document is longer than a row and rows are too short to hold the bytes
    that an entropy depends on.
    """
    spans = _spans([len(ids) for ids in documents], row_bytes, receptive_bytes(config))
    rows = _packed(documents, spans, row_bytes) if share_rows else [[(0, span)] for span in spans]
    results = [np.empty(len(ids), np.float32) for ids in documents]
    running = collections.deque()
    for first in range(0, len(rows), batch_size):
        group = rows[first : first + batch_size]
        tokens = sharding.put_batch(_tokens(documents, group, row_bytes, batch_size))
        running.append((group, entropy_fn(params, tokens)))
        if len(running) > 1:  # The device is busy with one while the host makes the next.
            _keep(results, *running.popleft())
    for group, values in running:
        _keep(results, group, values)
    return results


def _spans(lengths: Iterable[int], row_bytes: int, receptive: int) -> list[_Span]:
    """Returns spans that cover documents of these lengths, in order."""
    longest = max(lengths, default=0)
    if row_bytes < min(longest, 2 * receptive):
        raise ValueError(
            f"row_bytes={row_bytes} is too short for exact entropies of a document of {longest} "
            f"ids: the model looks back {receptive} bytes, use at least "
            f"{min(longest, 2 * receptive)}"
        )
    spans = []
    for i, length in enumerate(lengths):
        start = keep = 0
        while keep < length:
            spans.append(_Span(i, start, keep, min(start + row_bytes, length)))
            keep = spans[-1].stop
            start = keep - receptive
    return spans


def _packed(documents: Sequence[np.ndarray], spans: list[_Span], row_bytes: int) -> list[_Row]:
    """Packs spans into rows: each span, the longest first, where it leaves the least room."""
    rows: list[_Row] = []
    room: list[tuple[int, int]] = []  # sorted (free positions, row)
    for span in sorted(spans, key=lambda span: span.start - span.stop):
        size = span.stop - span.start
        fitting = bisect.bisect_left(room, (size,))
        if fitting == len(room):
            rows.append([])
            room.append((row_bytes, len(rows) - 1))
        free, row = room.pop(fitting)
        rows[row].append((row_bytes - free, span))
        # The next span starts after an EOS: the document's own, or one in between.
        free -= size + (documents[span.document][span.stop - 1] != EOS_ID)
        if free > 0:
            bisect.insort(room, (free, row))
    return rows


def _tokens(
    documents: Sequence[np.ndarray], rows: list[_Row], row_bytes: int, batch_size: int
) -> np.ndarray:
    tokens = np.full((batch_size, row_bytes), PAD_ID, np.int32)
    for row, spans in enumerate(rows):
        for at, (document, start, _, stop) in spans:
            if at:
                tokens[row, at - 1] = EOS_ID
            tokens[row, at : at + stop - start] = documents[document][start:stop]
    return tokens


def _keep(results: list[np.ndarray], rows: list[_Row], values: jax.Array) -> None:
    values = np.asarray(values)
    for row, spans in enumerate(rows):
        for at, (document, start, keep, stop) in spans:
            results[document][keep:stop] = values[row, at + keep - start : at + stop - start]
