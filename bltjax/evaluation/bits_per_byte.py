"""Bits per byte of a model on held-out rows."""

import jax
import numpy as np

from bltjax import sharding
from bltjax.data.packing import Row
from bltjax.data.pipeline import whole_batches


def evaluate(eval_step, params, rows: Row, batch_size: int) -> dict:
    """Sums of an eval step over all rows, in float64, with `bits_per_byte` over raw bytes.

    eval_step: jitted (params, batch) -> dict of `nats`, `targets`, `byte_nats`, `bytes`.
    """
    totals = {}
    for batch in whole_batches(rows, batch_size):
        sums = jax.device_get(eval_step(params, sharding.put_batch(batch)))
        totals = {k: totals.get(k, 0.0) + np.float64(v) for k, v in sums.items()}
    return {
        **{k: float(v) for k, v in totals.items()},
        "bits_per_byte": float(totals["byte_nats"] / totals["bytes"] / np.log(2)),
    }
