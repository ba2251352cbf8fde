"""How many nats a model needs for each document, whatever documents come with it.

A document's bytes are scored in rows of their own. A row's shape follows from what is in it, and
the number of rows in a batch from the shape, so the same numbers are added in the same order in
any company: on CPU scores are equal bit for bit.

Row lengths are powers of two from 64, and patch columns 1, 1/2, ... 1/16 of the length. With rows
of 8192 bytes at most 40 steps are ever compiled, or 8 for a model without patches; the entropy
model adds one for each power of two up to 8192, or up to four times what it looks back on (10 for
the released one).
"""

import collections
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
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
from bltjax.model import functional
from bltjax.ops.cross_entropy import next_byte_nats
from bltjax.patching.boundaries import needs_entropies, patch_starts
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.runtime.progress import OnProgress
from bltjax.vocabulary import BYTE_OFFSET, PAD_ID, encode

ROW_BYTES = 8192  # positions of a row, BOS and EOS among them
BATCH_BYTES = 8192  # positions of a batch, per row shard
_MAX_ROWS = 16  # of a batch, per row shard: a single short document should not cost a full batch
_MIN_LENGTH = 64  # shorter documents are padded to it
_MIN_COLUMNS = 1 / 16  # fewest patch columns of a row, as a share of its length
_CHUNK_BATCHES = 128  # documents whose entropies are in memory at a time, in full batches


class Score(NamedTuple):
    """What a document costs under a model."""

    nats: float  # -log p of its raw bytes, given BOS; EOS is not counted
    num_bytes: int
    num_patches: int  # of BOS + bytes + EOS; 0 under a model without patches
    bits_per_byte: float  # NaN without bytes


class Packed(NamedTuple):
    """A document that is ready for the model: its ids, patches (0: the model has none) and rows."""

    ids: np.ndarray
    num_patches: int
    rows: Iterable[Row]


def score_documents(
    config: BLTConfig,
    params,
    entropy_config: EntropyModelConfig | None,
    entropy_params,
    patching: PatchingConfig,
    documents: Sequence[bytes | str],
    *,
    row_bytes: int = ROW_BYTES,
    on_progress: OnProgress = None,
) -> list[Score]:
    """The Score of each document under a byte latent transformer, on the mesh that is set.

    A document of more than `row_bytes` ids goes on in further rows, as it does in training: what
    came before a row is unknown to the model there, but not to the entropies, which are those of
    the whole document. `patching.threshold` must be the one the model was trained with.
    `entropy_config` may be None under rules that need no entropies. `on_progress` is called with
    the number of bytes of each batch that is done. Raises ValueError for documents that are not a
    sequence of bytes or str, for a missing entropy model and for `row_bytes` below 8.
    """
    ids = map(encode, _checked(documents, row_bytes))
    packed = patched_rows(entropy_config, entropy_params, patching, ids, row_bytes)
    return _scores(config, params, packed, on_progress)


def score_bytes(
    config: EntropyModelConfig,
    params,
    documents: Sequence[bytes | str],
    *,
    row_bytes: int = ROW_BYTES,
    on_progress: OnProgress = None,
) -> list[Score]:
    """The Score of each document under a byte model without patches; see `score_documents`."""
    ids = map(encode, _checked(documents, row_bytes))
    return _scores(config, params, byte_rows(ids, row_bytes), on_progress)


def patched_rows(
    entropy_config: EntropyModelConfig | None,
    entropy_params,
    patching: PatchingConfig,
    documents: Iterable[np.ndarray],
    row_bytes: int,
) -> Iterator[Packed]:
    """The rows of each document's ids [S], in patches; a document of less than `row_bytes` has one.

    Raises ValueError at once where the rule needs an entropy model and there is none.
    """
    _check_entropy_model(entropy_config, patching)
    return (
        packed
        for ids in _chunks(documents)
        for packed in _patched(
            ids, document_starts(entropy_config, entropy_params, patching, ids), row_bytes
        )
    )


def _patched(documents, starts, row_bytes: int) -> Iterator[Packed]:
    for ids, s in zip(documents, starts, strict=True):
        length = _row_length(len(ids) + 1, row_bytes)  # + 1: patches cover one more
        yield Packed(ids, int(s.sum()), pack_patches([(ids, s)], length, length))


def byte_rows(documents: Iterable[np.ndarray], row_bytes: int) -> Iterator[Packed]:
    """The rows of each document's ids, for a model without patches."""
    for ids in documents:
        yield Packed(ids, 0, pack_bytes([ids], _row_length(len(ids), row_bytes)))


def document_starts(
    entropy_config: EntropyModelConfig | None,
    entropy_params,
    patching: PatchingConfig,
    documents: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """Where patches start in each document's ids [S]: bool [S], the first S of spec 2.1's N+1.

    Raises ValueError where the rule needs an entropy model and there is none.
    """
    _check_entropy_model(entropy_config, patching)
    entropies = [None] * len(documents)
    if needs_entropies(patching):
        entropies = document_entropies(
            entropy_config, entropy_params, documents, patching.reset_at_newlines
        )
    pairs = zip(documents, entropies, strict=True)
    return [patch_starts(patching, ids, h)[: len(ids)] for ids, h in pairs]


def document_entropies(
    config: EntropyModelConfig,
    params,
    documents: Sequence[np.ndarray],
    reset_at_newlines: bool = False,
) -> list[np.ndarray]:
    """float32 entropies [S] in nats of each document's ids [S], whatever documents come with it."""
    # Windows of a longer document start with what its bytes look back on: at most a quarter.
    longest = _row_length(max(BATCH_BYTES, 4 * receptive_bytes(config)))
    by_length = collections.defaultdict(list)
    for i, ids in enumerate(documents):
        by_length[_row_length(len(ids), longest)].append(i)
    results = [None] * len(documents)
    for length, members in by_length.items():
        found = corpus_entropies(
            _entropy_fn(config, reset_at_newlines),
            params,
            config,
            [documents[i] for i in members],
            row_bytes=length,
            batch_size=_batch_size(length),
        )
        for i, entropies in zip(members, found, strict=True):
            results[i] = entropies
    return results


_entropy_fn = functools.lru_cache(make_entropy_fn)  # one per model, so that it is compiled once


@functools.partial(jax.jit, static_argnums=0)
def _row_nats(config, params, batch):
    """Nats of the raw bytes that each row of a batch has as targets: float32 [B]."""
    nats = next_byte_nats(batch_logits(config, params, batch), batch["targets"])
    return jnp.sum(nats * raw_targets(batch), axis=1)


def batch_logits(config, params, batch):
    """Logits float32 [B, L, V] of a batch of rows, with patches or without."""
    inputs = [batch["document_ids"]]
    if "patch_lengths" in batch:
        inputs.insert(0, buffers_from_lengths(batch["patch_lengths"], batch["tokens"].shape[1]))
    return functional.apply(config, params, batch["tokens"], *inputs)


def raw_targets(batch):
    """Which targets count: bytes, neither BOS nor EOS."""
    return batch["loss_mask"] & (batch["targets"] >= BYTE_OFFSET)


def _scores(config, params, documents: Iterable[Packed], on_progress) -> list[Score]:
    sizes, nats = [], []

    def rows():
        for ids, num_patches, document_rows in documents:
            sizes.append((len(ids) - 2, num_patches))  # without BOS and EOS
            nats.append([])
            for row in document_rows:
                # Not so in an empty document, or in a last row of EOS.
                if raw_targets(row._asdict()).any():
                    yield len(nats) - 1, trim(row)

    for owners, num_bytes, row_nats in run_rows(_row_nats, config, params, rows()):
        for owner, value in zip(owners, row_nats, strict=False):  # filled up with padding rows
            nats[owner].append(float(value))
        if on_progress:
            on_progress(num_bytes)
    # A document's rows may come back in any order: fsum is exact, and the same in all.
    totals = zip(map(math.fsum, nats), sizes, strict=True)
    return [_score(total, *size) for total, size in totals]


def _score(nats: float, num_bytes: int, num_patches: int) -> Score:
    bits = nats / math.log(2) / num_bytes if num_bytes else math.nan
    return Score(nats, num_bytes, num_patches, bits)


def run_rows(step, config, params, rows: Iterator[tuple[int, Row]]):
    """(document of each row, raw targets in all, step's result) of batches of rows of equal shape.

    step: jitted (config, params, batch) -> arrays [B]; a last batch is filled up, so that they may
    be longer than the documents.
    """
    running = collections.deque()
    for group in _groups(rows):
        owners, members = zip(*group, strict=True)
        (rows_of_batch,) = whole_batches(iter(members), _batch_size(len(members[0].tokens)))
        batch = as_batch(rows_of_batch)
        result = step(config, params, sharding.put_batch(batch))
        running.append((owners, int(raw_targets(batch).sum()), result))
        if len(running) > 1:  # the device is busy with one while the host makes the next
            yield _fetched(running.popleft())
    yield from map(_fetched, running)


def _fetched(batch):
    owners, num_bytes, result = batch
    return owners, num_bytes, jax.tree.map(np.asarray, result)


def _groups(rows: Iterator[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    """Rows of one shape, a batch at a time; what fills no batch comes last."""
    waiting = collections.defaultdict(list)
    for owner, row in rows:
        shape = len(row.tokens), len(row.patch_lengths)
        waiting[shape].append((owner, row))
        if len(waiting[shape]) == _batch_size(shape[0]):
            yield waiting.pop(shape)
    yield from waiting.values()


def trim(row: Row) -> Row:
    """The row in the smallest shape of the list that holds its bytes and patches."""
    used = int(np.count_nonzero(row.tokens != PAD_ID))
    # Room for one more patch than bytes, the tail; packing gives no full row more than its length.
    length = _row_length(used + 1, len(row.tokens))
    lengths = row.patch_lengths
    if lengths.size:
        num_patches = np.count_nonzero(lengths)
        lengths = lengths[: _num_columns(num_patches, length)].copy()
        lengths[num_patches - 1] = length + 1 - used
    return Row(*(field[:length] for field in row[:-1]), lengths)


def _row_length(num_ids: int, row_bytes: int | None = None) -> int:
    """The smallest power of two from 64 that holds `num_ids`, but at most `row_bytes`."""
    length = max(_MIN_LENGTH, 1 << (num_ids - 1).bit_length())
    return length if row_bytes is None else min(length, row_bytes)


def _num_columns(num_patches: int, length: int) -> int:
    """The smallest of length, length / 2, length / 4, ... that holds `num_patches`."""
    columns = length
    while columns > max(length * _MIN_COLUMNS, 2) and -(-columns // 2) >= num_patches:
        columns = -(-columns // 2)
    return columns


def _batch_size(length: int) -> int:
    shards = sharding.num_row_shards(jax.sharding.get_abstract_mesh())
    return shards * max(1, min(_MAX_ROWS, BATCH_BYTES // length))


def _chunks(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Ids of consecutive documents, so many that batches which are not full matter little."""
    shards = sharding.num_row_shards(jax.sharding.get_abstract_mesh())
    chunk, size = [], 0
    for ids in documents:
        chunk.append(ids)
        size += len(ids)
        if size >= _CHUNK_BATCHES * BATCH_BYTES * shards:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _check_entropy_model(entropy_config: EntropyModelConfig | None, patching: PatchingConfig):
    if needs_entropies(patching) and entropy_config is None:
        raise ValueError(
            f"patching rule {patching.rule!r} needs an entropy model and there is none: "
            "give entropy_model="
        )


def _checked(documents: Sequence[bytes | str], row_bytes: int) -> list[bytes | str]:
    if isinstance(documents, (bytes, bytearray, memoryview, str)):
        raise ValueError(f"documents is one {type(documents).__name__}: give a list of documents")
    if row_bytes < 8:
        raise ValueError(f"row_bytes={row_bytes} must be at least 8")
    documents = list(documents)
    for i, document in enumerate(documents):
        if not isinstance(document, (bytes, bytearray, memoryview, str)):
            raise ValueError(f"documents[{i}] is {type(document).__name__}: give bytes or str")
    return documents
