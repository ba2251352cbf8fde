"""Measures the bits per byte of a model on held-out rows."""

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from bltjax import sharding
from bltjax.data.batches.loader import as_batch
from bltjax.data.batches.rows import Row


def evaluate(eval_step, params, batches: Iterator[Row], sources: Sequence[str], *frozen) -> dict:
    """Sums the results of an eval step over batches of rows, in float64.

    eval_step: jitted (params, batch, *frozen) -> dict of `nats`, `targets`, `byte_nats`, `bytes`,
    `source_nats`, `source_bytes`. Returns these sums, `bits_per_byte` over raw bytes, and `sources`
    with bits_per_byte and bytes of each source.
    """
    totals = sum_up(eval_step, params, batches, *frozen)
    by_source = zip(sources, totals.pop("source_nats"), totals.pop("source_bytes"), strict=True)
    return {
        **{k: float(v) for k, v in totals.items()},
        "bits_per_byte": float(totals["byte_nats"] / totals["bytes"] / np.log(2)),
        "sources": {
            name: dict(bits_per_byte=float(nats / size / np.log(2)), bytes=int(size))
            for name, nats, size in by_source
            if size
        },
    }


def sum_up(step, params, batches: Iterable[Row], *frozen) -> dict:
    """Returns the sums, in float64, of what a step gives for batches of rows.

    step: jitted (params, batch, *frozen) -> dict of arrays.
    """
    totals: dict = {}
    for rows in batches:  # each process has all rows, and puts its own on its devices
        own = sharding.rows_of_process(len(rows.tokens))
        rows = Row(*(x[own] for x in rows))
        batch = sharding.put_batch(as_batch(rows, sources=True))
        sums = jax.device_get(step(params, batch, *frozen))
        totals = {k: totals.get(k, 0.0) + np.float64(v) for k, v in sums.items()}
    return totals
