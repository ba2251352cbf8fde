"""One training step and one evaluation step, for both models.

A batch is a dict of arrays with rows sharded over the mesh: tokens, targets, document_ids int32
[B, L], loss_mask bool [B, L] and, for the byte latent transformer, patch_lengths int32 [B, P].
Shapes never depend on the text, so each step is compiled once.
"""

import jax
import jax.numpy as jnp
import optax

from bltjax.model import functional
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.training.loss import bits_per_byte, loss_sums
from bltjax.training.state import TrainState


def make_train_step(model_config, optimizer: optax.GradientTransformation, learning_rate):
    """jitted (state, batch) -> (state, metrics); the old state's memory is reused.

    learning_rate: function of the completed steps, for the metrics only.
    """

    def train_step(state: TrainState, batch):
        def loss_fn(params):
            sums = batch_sums(model_config, params, batch)
            return sums["nats"] / jnp.maximum(sums["targets"], 1), sums

        (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = dict(
            loss=loss,
            bits_per_byte=bits_per_byte(sums),
            grad_norm=optax.tree.norm(grads),
            bytes=sums["bytes"],
            learning_rate=learning_rate(state.step),
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(model_config):
    """jitted (params, batch) -> `loss_sums` of the batch."""
    return jax.jit(lambda params, batch: batch_sums(model_config, params, batch))


def batch_sums(model_config, params, batch):
    """Forward pass of either model over a batch -> `loss_sums`."""
    inputs = [batch["document_ids"]]
    if "patch_lengths" in batch:
        inputs.insert(0, buffers_from_lengths(batch["patch_lengths"], batch["tokens"].shape[1]))
    logits = functional.apply(model_config, params, batch["tokens"], *inputs)
    return loss_sums(logits, batch["targets"], batch["loss_mask"])
