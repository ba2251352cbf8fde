"""Next-byte cross-entropy."""

import jax
import jax.numpy as jnp


def next_byte_nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns nats of each target: logits [B, L, V], targets int [B, L] -> float32 [B, L]."""
    return nats_and_log_sums(logits, targets)[0]


@jax.custom_vjp
def nats_and_log_sums(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns nats of each target, and the log of each softmax's sum, both float32 [B, L].

    logits [B, L, V], targets int [B, L]. Sums are float32. The backward pass is elementwise: JAX's
    own derivative scatters into zeros as large as the logits.
    """
    return _forward(logits, targets)[0]


def _forward(logits, targets):
    log_sums = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (log_sums - chosen.astype(jnp.float32), log_sums), (logits, targets, log_sums)


def _backward(saved, gradients):
    logits, targets, log_sums = saved
    of_nats, of_log_sums = gradients
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    softmax = jnp.exp(logits.astype(jnp.float32) - log_sums[..., None])
    chosen = jnp.where(ids == targets[..., None], of_nats[..., None], 0)
    return (softmax * (of_nats + of_log_sums)[..., None] - chosen).astype(logits.dtype), None


nats_and_log_sums.defvjp(_forward, _backward)
