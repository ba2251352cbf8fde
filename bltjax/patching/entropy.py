"""Entropy of the next byte, from the logits of the entropy model."""

import jax
import jax.numpy as jnp


def next_byte_entropy(logits: jax.Array) -> jax.Array:
    """Returns the entropy, float32 [...] in nats, of softmax(logits [..., V]).

    Computed in float32 whatever the logits are. A logit of -inf is an impossible byte and adds 0.
    See model.md#entropy.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    # p log p tends to 0 with p; the inner `where` keeps 0 * -inf out of the gradient as well.
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0), axis=-1)
