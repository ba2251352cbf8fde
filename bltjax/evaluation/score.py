"""The scorer: how many nats a model needs for each document, whatever documents come with it.

A document is scored in rows of its own. A row's shape follows from what is in it, and the number of
rows in a batch from the shape, so the same numbers are added in the same order in any company: on
CPU scores are equal bit for bit.

Row lengths are powers of two from 64, and patch columns 1, 1/2, ... 1/16 of the length. With rows
of 8192 bytes at most 40 steps are ever compiled, or 8 for a model without patches; the entropy
model adds one for each power of two up to 8192, or up to four times what it looks back on (10 for
the released one).
"""

import collections
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig, PatchingConfig
from bltjax.data.batches.loader import as_batch, whole_batches
from bltjax.data.batches.packing import pack_bytes, pack_patches
from bltjax.data.batches.rows import Row
from bltjax.data.records.entropies import corpus_entropies, make_entropy_fn, receptive_bytes
from bltjax.data.sources.readers import in_chunks
from bltjax.model import functional
from bltjax.ops.cross_entropy import next_byte_nats
from bltjax.patching.boundaries import needs_entropies, patch_starts
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.runtime.progress import OnProgress
from bltjax.runtime.terminal import short
from bltjax.vocabulary import BYTE_OFFSET, PAD_ID, TEXT, VOCAB_SIZE, as_list, encode

ROW_BYTES = 8192  # positions of a row, BOS and EOS among them
BATCH_BYTES = 8192  # positions of a batch, per row shard
_MAX_ROWS = 16  # of a batch, per row shard: a single short document should not cost a full batch
_MIN_LENGTH = 64  # shorter documents are padded to it
_MIN_COLUMNS = 1 / 16  # fewest patch columns of a row, as a share of its length
# Documents whose entropies are in memory at a time, so many that unfilled batches matter little.
_CHUNK_BATCHES = 128


class Score(NamedTuple):
    """Cost of a document under a model."""

    nats: float  # -log p of its raw bytes, given BOS; EOS is not counted
    num_bytes: int
    num_patches: int  # of BOS + bytes + EOS; ids under a model of tokens, 0 under one of bytes
    bits_per_byte: float  # NaN without bytes


class Packed(NamedTuple):
    """A document that is ready for a model: its ids, number of patches and rows."""

    ids: np.ndarray  # int32 [S]
    num_patches: int
    rows: Iterable[Row]


@dataclass
class ByteScoring:
    """A model of bytes without patches as the scorer needs it; other models are subclasses."""

    config: EntropyModelConfig | BLTConfig
    params: dict

    num_ids = VOCAB_SIZE  # ids that exist; logits may have more
    spare = 1  # positions of a row that a context leaves free
    byte_lengths = np.repeat(np.int32([0, 1]), [BYTE_OFFSET, VOCAB_SIZE - BYTE_OFFSET])  # of ids

    def encode(self, document: bytes | str) -> np.ndarray:
        """Returns the ids int32 [S] of a document, from BOS to EOS."""
        return encode(document)

    def encode_pair(self, context: bytes | str, continuation: bytes | str):
        """Returns the ids int32 [S] of both after BOS, and the index where the second begins."""
        parts = encode(context, add_eos=False), encode(continuation, add_bos=False, add_eos=False)
        return np.concatenate(parts), len(parts[0])

    def pack(self, documents: Iterable[np.ndarray], row_length: int) -> Iterator[Packed]:
        """Yields the ids [S] of each document in rows; a short one has a single row."""
        for ids in documents:
            yield Packed(ids, 0, pack_bytes([ids], fitting_length(len(ids), row_length)))


@dataclass
class BLTScoring(ByteScoring):
    """A byte latent transformer, with patches by `patching`, whose threshold is the trained one.

    entropy_config, entropy_params: None under rules that need no entropies.
    """

    entropy_config: EntropyModelConfig | None
    entropy_params: dict | None
    patching: PatchingConfig

    def pack(self, documents: Iterable[np.ndarray], row_length: int) -> Iterator[Packed]:
        """Raises ValueError where the rule needs an entropy model and there is none."""
        shards = sharding.num_row_shards(jax.sharding.get_abstract_mesh())
        for chunk in in_chunks(documents, len, _CHUNK_BATCHES * BATCH_BYTES * shards):
            for ids, starts in zip(chunk, self.find_starts(chunk), strict=True):
                length = fitting_length(len(ids) + 1, row_length)  # + 1: patches cover one more
                rows = pack_patches([(ids, starts)], length, length)
                yield Packed(ids, int(starts.sum()), rows)

    def find_starts(self, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns bool [S] for each document's ids [S]: its patch starts, without the one at S."""
        patching, entropies = self.patching, [None] * len(documents)
        if needs_entropies(patching):
            if self.entropy_config is None:
                raise ValueError(
                    f"patching rule {patching.rule!r} needs an entropy model and there is none: "
                    "give entropy_model="
                )
            model = self.entropy_config, self.entropy_params
            entropies = document_entropies(*model, documents, patching.reset_at_newlines)
        pairs = zip(documents, entropies, strict=True)
        return [patch_starts(patching, ids, h)[: len(ids)] for ids, h in pairs]


def score_documents(
    model: ByteScoring,
    documents: Sequence[bytes | str],
    *,
    row_bytes: int = ROW_BYTES,
    on_progress: OnProgress = None,
) -> list[Score]:
    """Returns the Score of each document under a model, on the mesh that is set.

    A document of more than `row_bytes` ids goes on in further rows, as it does in training: what
    came before a row is unknown to the model there, but not to the entropies, which are those of
    the whole document. `on_progress` is told the number of bytes of each batch that is done. Raises
    ValueError for documents that are not a sequence of bytes or str, for a missing entropy model
    and for `row_bytes` below 8.
    """
    check_row(row_bytes)
    documents = as_list("documents", documents)
    for i, document in enumerate(documents):
        if not isinstance(document, TEXT):
            raise ValueError(f"documents[{i}] is {type(document).__name__}: give bytes or str")
    ids = map(model.encode, documents)
    sizes, results = run_rows(_row_nats, model, ids, itertools.repeat(1), row_bytes, on_progress)
    scores = []
    for (num_bytes, num_patches), row_nats in zip(sizes, results, strict=True):
        nats = math.fsum(row_nats)  # exact, so the same in any order of the rows
        bits = nats / math.log(2) / num_bytes if num_bytes else math.nan
        scores.append(Score(nats, num_bytes, num_patches, bits))
    return scores


def document_entropies(
    config: EntropyModelConfig,
    params,
    documents: Sequence[np.ndarray],
    reset_at_newlines: bool = False,
) -> list[np.ndarray]:
    """Returns float32 entropies [S] in nats of each document's ids [S], in any company the same."""
    # Windows of a longer document start with what its bytes look back on: at most a quarter.
    longest = fitting_length(max(BATCH_BYTES, 4 * receptive_bytes(config)))
    by_length = collections.defaultdict(list)
    for i, ids in enumerate(documents):
        by_length[fitting_length(len(ids), longest)].append(i)
    results = [None] * len(documents)
    for length, members in by_length.items():
        found = corpus_entropies(
            _entropy_fn(config, reset_at_newlines),
            params,
            config,
            [documents[i] for i in members],
            row_bytes=length,
            batch_size=rows_at_once(length),
        )
        for i, entropies in zip(members, found, strict=True):
            results[i] = entropies
    return results


_entropy_fn = functools.lru_cache(make_entropy_fn)  # one per model, so that it is compiled once


@functools.partial(jax.jit, static_argnums=0)
def _row_nats(config, params, batch):
    """Returns the nats of the targets with bytes of each row of a batch: float32 [B]."""
    nats = next_byte_nats(batch_logits(config, params, batch), batch["targets"])
    return jnp.sum(nats, axis=1, where=raw_targets(batch))


def batch_logits(config, params, batch):
    """Returns logits float32 [B, L, V] of a batch of rows, with patches or without."""
    inputs = [batch["document_ids"]]
    if "patch_lengths" in batch:
        inputs.insert(0, buffers_from_lengths(batch["patch_lengths"], batch["tokens"].shape[1]))
    return functional.apply(config, params, batch["tokens"], *inputs)


def raw_targets(batch):
    """Returns which targets count: those with bytes, neither BOS nor EOS."""
    return batch["loss_mask"] & (batch["targets"] >= BYTE_OFFSET)


def run_rows(
    step,
    model: ByteScoring,
    documents: Iterable[np.ndarray],
    firsts: Iterable[int],
    row_length: int,
    on_progress: OnProgress,
):
    """Returns (bytes, patches) of each document, and a list of the results of its rows.

    step: jitted (config, params, batch) -> pytree of arrays [B]. documents: ids [S] of each.
    firsts: the first index of each document that is scored.
    """
    sizes, results = [], []

    def rows():
        for packed, first in zip(model.pack(documents, row_length), firsts, strict=False):
            num_bytes = int(model.byte_lengths[packed.ids].sum())
            sizes.append((num_bytes, packed.num_patches))
            results.append([])
            for row in _scored_rows(packed.rows, first):
                yield len(results) - 1, trim(row)

    for owners, num_bytes, found in _run_batches(step, model, rows()):
        found = jax.tree.map(np.asarray, found)
        for i, owner in enumerate(owners):
            results[owner].append(jax.tree.map(lambda x, i=i: x[i], found))
        if on_progress:
            on_progress(num_bytes)
    return sizes, results


def _scored_rows(rows: Iterable[Row], first: int) -> Iterator[Row]:
    """Yields the rows with a target among ids[first:] that has bytes, and masks other targets."""
    position = 0  # in the document, of the row's first id
    for row in rows:
        targets_at = position + 1 + np.arange(len(row.tokens))
        row = row._replace(loss_mask=raw_targets(row._asdict()) & (targets_at >= first))
        if row.loss_mask.any():
            yield row
        position += np.count_nonzero(row.tokens != PAD_ID)


def _run_batches(step, model: ByteScoring, rows: Iterator[tuple[int, Row]]):
    """Yields (document of each row, bytes of their targets, results) of batches of equal shape.

    A last batch is filled up, so results may be longer than the documents.
    """
    running = collections.deque()
    for group in _groups(rows):
        owners, members = zip(*group, strict=True)
        (rows_of_batch,) = whole_batches(iter(members), rows_at_once(len(members[0].tokens)))
        batch = as_batch(rows_of_batch)
        num_bytes = int(model.byte_lengths[batch["targets"][raw_targets(batch)]].sum())
        result = step(model.config, model.params, sharding.put_batch(batch))
        running.append((owners, num_bytes, result))
        if len(running) > 1:  # the device is busy with one while the host makes the next
            yield running.popleft()
    yield from running


def _groups(rows: Iterator[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    """Yields rows of one shape, a batch at a time; batches that are not full come last."""
    waiting = collections.defaultdict(list)
    for owner, row in rows:
        shape = len(row.tokens), len(row.patch_lengths)
        waiting[shape].append((owner, row))
        if len(waiting[shape]) == rows_at_once(shape[0]):
            yield waiting.pop(shape)
    yield from waiting.values()


def trim(row: Row) -> Row:
    """Returns the row in the smallest shape of the list that holds its ids and patches."""
    used = int(np.count_nonzero(row.tokens != PAD_ID))
    # Room for one more patch than bytes, the tail; packing gives no full row more than its length.
    length = fitting_length(used + 1, len(row.tokens))
    lengths = row.patch_lengths
    if lengths.size:
        num_patches = np.count_nonzero(lengths)
        lengths = lengths[: _num_columns(num_patches, length)].copy()
        lengths[num_patches - 1] = length + 1 - used
    fields = {name: field[:length] for name, field in row._asdict().items()}
    return Row(**fields | dict(patch_lengths=lengths))


def fitting_length(num_ids: int, row_bytes: int = 2**30) -> int:
    """Returns the smallest power of two from 64 that holds `num_ids`, at most `row_bytes`."""
    return min(max(_MIN_LENGTH, 1 << (num_ids - 1).bit_length()), row_bytes)


def _num_columns(num_patches: int, length: int) -> int:
    """Returns the smallest of length, length / 2, length / 4, ... that holds `num_patches`."""
    columns = length
    while columns > max(length * _MIN_COLUMNS, 2) and -(-columns // 2) >= num_patches:
        columns = -(-columns // 2)
    return columns


def rows_at_once(length: int) -> int:
    shards = sharding.num_row_shards(jax.sharding.get_abstract_mesh())
    return shards * max(1, min(_MAX_ROWS, BATCH_BYTES // length))


def check_row(row_bytes: int):
    """Raises ValueError for rows that are too short, or no number."""
    if isinstance(row_bytes, bool) or not isinstance(row_bytes, (int, np.integer)) or row_bytes < 8:
        raise ValueError(f"row_bytes={short(row_bytes)} must be at least 8, a whole number")
