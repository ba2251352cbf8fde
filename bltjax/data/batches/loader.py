"""Turns documents into a stream of batches that can be resumed."""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset, ZipIterDataset

from bltjax.data.batches.lanes import LaneBatches, Layout, initial_state
from bltjax.data.batches.rows import Row

READ_AHEAD = 8  # batches


def batches(
    documents,
    layout: Layout,
    batch_size: int,
    states: np.ndarray | None = None,
    rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Iterator[tuple[Row, np.ndarray]]:
    """Yields batches, each with the state from which the next one follows.

    A batch is a Row whose arrays have a leading axis.

    documents: an order, see `order`. states: int64 [rows, ...], one line for the lane of each row,
    to resume from a state that came with a batch. rows: the rows of the batch that this process
    makes, default all. workers: processes that share the work, 0 for a thread; same batches.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if states is None:
        states = np.tile(initial_state(layout), (len(rows), 1))
    groups = np.array_split(np.arange(len(rows)), min(max(workers, 1), len(rows)))
    parts = [
        LaneBatches(documents, layout, rows[group].tolist(), batch_size, states[group])
        for group in groups
    ]
    if workers:
        options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=READ_AHEAD)
        parts = [part.mp_prefetch(options, worker_init_fn=_serve_parent) for part in parts]
    joined = ZipIterDataset(parts).map(_join)
    return iter(ThreadPrefetchIterDataset(joined, prefetch_buffer_size=READ_AHEAD))


def _serve_parent(*_):
    """Makes a worker ignore signals, which are for its parent, and end when its parent does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _join(parts) -> tuple[Row, np.ndarray]:
    rows, states = zip(*parts, strict=True)
    return Row(*map(np.concatenate, zip(*rows, strict=True))), np.concatenate(states)


def as_batch(rows: Row, sources: bool = False) -> dict:
    """Returns rows as the dict of arrays that a step takes: int32, masks bool.

    patch_lengths and teacher_tokens are left out where rows have none, source_ids unless `sources`
    is True.
    """
    batch = {
        name: np.asarray(value, value.dtype if value.dtype == bool else np.int32)
        for name, value in rows._asdict().items()
    }
    for name in ("patch_lengths", "teacher_tokens"):
        if not batch[name].shape[-1]:
            del batch[name]
    if not sources:
        del batch["source_ids"]
    return batch


def whole_batches(rows: Iterator[Row], batch_size: int) -> Iterator[Row]:
    """Yields all rows in batches; the last one is filled up with rows whose loss_mask is False."""
    while group := list(itertools.islice(rows, batch_size)):
        nothing = group[-1]._replace(loss_mask=np.zeros_like(group[-1].loss_mask))
        group += [nothing] * (batch_size - len(group))
        yield Row(*map(np.stack, zip(*group, strict=True)))
