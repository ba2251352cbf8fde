"""Entropies of a corpus under a trained entropy model, computed once and stored.

Documents go through the model in windows of one static shape. A window starts with enough of
what came before that every kept entropy is the one a pass over the whole document would give: a
byte's entropy depends on num_layers * (window - 1) earlier bytes and no more.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from bltjax import sharding
from bltjax.config import EntropyModelConfig
from bltjax.files import replacing
from bltjax.model import functional
from bltjax.patching.boundaries import entropy_segments
from bltjax.patching.entropy import next_byte_entropy
from bltjax.vocabulary import PAD_ID

SHARD_BYTES = 1_000_000  # of documents in one file, the unit of resuming


def make_entropy_fn(config: EntropyModelConfig, reset_at_newlines: bool = False):
    """jitted (params, tokens int32 [B, L]) -> entropies float32 [B, L] in nats (spec 2.2)."""

    @jax.jit
    def entropies(params, tokens):
        tokens = sharding.shard_rows(tokens)
        segments = entropy_segments(tokens, reset_at_newlines)
        return next_byte_entropy(functional.apply(config, params, tokens, segments))

    return entropies


def receptive_bytes(config: EntropyModelConfig) -> int:
    """How many earlier bytes an entropy can depend on."""
    return config.transformer.num_layers * (config.transformer.window - 1)


def corpus_entropies(
    entropy_fn,
    params,
    config: EntropyModelConfig,
    documents: Sequence[np.ndarray],
    row_bytes: int,
    batch_size: int,
) -> list[np.ndarray]:
    """float32 entropies [S] of each document's ids [S]; entry i is the uncertainty after id i.

    `row_bytes` positions and `batch_size` rows are the one shape that is compiled. Raises
    ValueError where a document is longer than a row, and rows are too short to hold the bytes that
    an entropy depends on.
    """
    receptive, longest = receptive_bytes(config), max(map(len, documents), default=0)
    if row_bytes < min(longest, 2 * receptive):
        raise ValueError(
            f"row_bytes={row_bytes} is too short for exact entropies of a document of {longest} "
            f"ids: the model looks back {receptive} bytes, use at least "
            f"{min(longest, 2 * receptive)}"
        )
    results = [np.empty(len(ids), np.float32) for ids in documents]
    spans = [
        span
        for i, ids in enumerate(documents)
        for span in _spans(i, len(ids), row_bytes, receptive)
    ]
    for first in range(0, len(spans), batch_size):
        group = spans[first : first + batch_size]
        tokens = np.full((batch_size, row_bytes), PAD_ID, np.int32)
        for row, (i, start, _, stop) in enumerate(group):
            tokens[row, : stop - start] = documents[i][start:stop]
        values = np.asarray(entropy_fn(params, sharding.put_batch(tokens)))
        for row, (i, start, keep, stop) in enumerate(group):
            results[i][keep:stop] = values[row, keep - start : stop - start]
    return results


def stored_entropies(
    directory: Path, name: str, documents: Sequence[np.ndarray], compute
) -> list[np.ndarray]:
    """Entropies of documents, kept in files `directory/name-NNNNN.npy` of about SHARD_BYTES.

    `compute` gives the entropies of a list of documents; a shard that is there is only read, so an
    interrupted run goes on at the first missing one. Raises ValueError for a file that does not
    fit the documents.
    """
    directory.mkdir(exist_ok=True)
    shards = list(_shards(documents))
    total, done, started, values = sum(map(len, documents)), 0, time.perf_counter(), []
    for number, shard in enumerate(shards):
        path = directory / f"{name}-{number:05d}.npy"
        if path.exists():
            values += _read_shard(path, shard)
            total -= sum(map(len, shard))
            continue
        values += compute(shard)
        with replacing(path) as file:
            np.save(file, np.concatenate(values[-len(shard) :]))
        done += sum(map(len, shard))
        rate = done / (time.perf_counter() - started)
        print(
            f"entropies of {name}: shard {number + 1}/{len(shards)} | {rate / 1e3:.0f} KB/s | "
            f"eta {max(total - done, 0) / rate:.0f}s",
            flush=True,
        )
    return values


def _shards(documents):
    """Consecutive documents in groups of about SHARD_BYTES."""
    group, size = [], 0
    for ids in documents:
        group.append(ids)
        size += len(ids)
        if size >= SHARD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _read_shard(path: Path, documents) -> list[np.ndarray]:
    lengths = [len(ids) for ids in documents]
    try:
        stored = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): delete it to compute it again"
        ) from None
    if len(stored) != sum(lengths):
        raise ValueError(
            f"{path} holds {len(stored)} entropies for {sum(lengths)} bytes: the corpus has "
            "changed since, delete the working directory's entropies or use a new one"
        )
    return np.split(stored, np.cumsum(lengths)[:-1])


def _spans(document: int, length: int, row_bytes: int, receptive: int):
    """(document, start, first kept, stop) of the windows that cover a document."""
    yield document, 0, 0, min(length, row_bytes)
    keep = row_bytes
    while keep < length:
        start = keep - receptive
        yield document, start, keep, min(length, start + row_bytes)
        keep = start + row_bytes
