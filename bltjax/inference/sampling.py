"""Choosing the next byte from its logits."""

import jax
import jax.numpy as jnp

from bltjax.vocabulary import BYTE_OFFSET, EOS_ID, VOCAB_SIZE


def sample(logits: jax.Array, temperature: float, key: jax.Array) -> jax.Array:
    """Next id int32 [] from logits float32 [V]; greedy at temperature 0.

    Only raw bytes and EOS can be chosen: the other special ids have no bytes to show.
    """
    ids = jnp.arange(logits.shape[-1])
    allowed = ((ids >= BYTE_OFFSET) & (ids < VOCAB_SIZE)) | (ids == EOS_ID)
    logits = jnp.where(allowed, logits, -jnp.inf)
    greedy = jnp.argmax(logits)
    drawn = jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1.0))
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
