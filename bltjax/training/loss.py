"""Next-byte cross-entropy and what is counted in bits per byte."""

import jax.numpy as jnp

from bltjax.ops.cross_entropy import next_byte_nats
from bltjax.vocabulary import BYTE_OFFSET

LN2 = 0.6931471805599453


def loss_sums(logits, targets, mask):
    """Float32 sums over a batch: nats and number of trained targets, the same for raw bytes.

    Bits per byte count raw bytes only: neither the nats nor the number hold BOS or EOS, so the
    figure compares with any compressor's.
    """
    nats = next_byte_nats(logits, targets)
    raw = mask & (targets >= BYTE_OFFSET)
    return dict(
        nats=jnp.sum(nats * mask),
        targets=jnp.sum(mask, dtype=jnp.float32),
        byte_nats=jnp.sum(nats * raw),
        bytes=jnp.sum(raw, dtype=jnp.float32),
    )


def bits_per_byte(sums):
    """Bits per raw byte of `loss_sums` (or of several added up)."""
    return sums["byte_nats"] / sums["bytes"] / LN2
