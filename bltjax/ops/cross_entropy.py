"""Next-byte cross-entropy."""

import jax
import jax.numpy as jnp


def next_byte_nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns nats of each target: logits [B, L, V], targets int [B, L] -> float32 [B, L]."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
