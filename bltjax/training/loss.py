"""Sums of next-byte cross-entropy over a batch, and bits per byte."""

import functools

import jax
import jax.numpy as jnp

from bltjax import sharding
from bltjax.ops.cross_entropy import nats_and_log_sums
from bltjax.vocabulary import BYTE_OFFSET

LN2 = 0.6931471805599453


def loss_sums(
    logits, targets, mask, source_ids=None, num_sources: int = 1, with_z=False, byte_lengths=None
):
    """Sums over a batch, float32: `nats` and `targets`, and `byte_nats` and `bytes` of raw bytes.

    Raw bytes leave out BOS and EOS, in nats and in number, so that bits per byte compare with any
    compressor's. source_ids: int32 [B, L], the source of each position; with them the result has
    `source_nats` and `source_bytes` [num_sources] of raw bytes. with_z: the result has `z`, the
    squared log of the softmax's sum over targets; a loss on it keeps logits near 0 (PaLM, 2022,
    section 5). byte_lengths: int32 [V], where ids are tokens, the raw bytes of each; the result
    then has `tokens`, the number of targets that stand for raw bytes.
    """
    nats, log_sums = nats_and_log_sums(logits, targets)
    raw = num_bytes = mask & (targets >= BYTE_OFFSET)
    if byte_lengths is not None:
        num_bytes = raw * sharding.lookup(jnp.asarray(byte_lengths)[:, None], targets)[..., 0]
    sums = dict(
        nats=jnp.sum(nats * mask),
        targets=jnp.sum(mask, dtype=jnp.float32),
        byte_nats=jnp.sum(nats * raw),
        bytes=jnp.sum(num_bytes, dtype=jnp.float32),
    )
    if byte_lengths is not None:
        sums["tokens"] = jnp.sum(raw, dtype=jnp.float32)
    if source_ids is not None:
        # A vmap over rows: a sharded batch needs no out_sharding, and rows never exchange data.
        by_source = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=num_sources))
        sums["source_nats"] = jnp.sum(by_source(nats * raw, source_ids), axis=0)
        sums["source_bytes"] = jnp.sum(by_source(num_bytes.astype(jnp.float32), source_ids), axis=0)
    if with_z:
        sums["z"] = jnp.sum(mask * log_sums**2)
    return sums


def bits_per_byte(sums):
    """Returns bits per raw byte from `loss_sums`, or from the sum of several."""
    return sums["byte_nats"] / sums["bytes"] / LN2
