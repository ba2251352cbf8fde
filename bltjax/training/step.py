"""One training step and one evaluation step, for both models.

A batch is a dict of arrays with rows sharded over the mesh: tokens, targets, document_ids int32
[B, L], loss_mask bool [B, L] and, for the byte latent transformer, patch_lengths int32 [B, P]
unless the step finds the patches itself. Where it has source_ids int32 [B, L], nats and bytes are
told by source. Shapes never depend on the text, so each step is compiled once.
"""

import jax
import jax.numpy as jnp
import optax

from bltjax.model import functional
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.training.in_step import patch_counts
from bltjax.training.loss import bits_per_byte, loss_sums
from bltjax.training.state import TrainState


def make_train_step(
    model_config,
    optimizer: optax.GradientTransformation,
    learning_rate,
    find_patches=None,
    num_sources: int = 1,
):
    """jitted (state, batch) -> (state, metrics); the old state's memory is reused.

    learning_rate: function of the completed steps, for the metrics only. With `find_patches`, from
    `in_step.make_patch_finder`, the step is (state, batch, entropy_params) and its metrics tell the
    mean patch in bytes and how many patches did not fit.
    """

    def train_step(state: TrainState, batch, entropy_params=None):
        patches, counts = _find(find_patches, entropy_params, batch)

        def loss_fn(params):
            sums = batch_sums(model_config, params, batch, patches, num_sources)
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
        metrics |= {k: v for k, v in sums.items() if k.startswith("source_")}
        if counts:
            metrics["overflow"] = counts["overflow"]
            metrics["mean_patch_bytes"] = counts["inputs"] / jnp.maximum(counts["patches"], 1)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(model_config, find_patches=None, num_sources: int = 1):
    """jitted (params, batch) -> `loss_sums` of the batch.

    With `find_patches` it is (params, batch, entropy_params), and the sums hold `patch_counts` too.
    """

    def eval_step(params, batch, entropy_params=None):
        patches, counts = _find(find_patches, entropy_params, batch)
        return batch_sums(model_config, params, batch, patches, num_sources) | counts

    return jax.jit(eval_step)


def batch_sums(model_config, params, batch, patches=None, num_sources: int = 1):
    """Forward pass of either model over a batch -> `loss_sums`.

    patches: PatchBuffers, where the batch has no patch_lengths.
    """
    if patches is None and "patch_lengths" in batch:
        patches = buffers_from_lengths(batch["patch_lengths"], batch["tokens"].shape[1])
    inputs = [batch["document_ids"]] if patches is None else [patches, batch["document_ids"]]
    logits = functional.apply(model_config, params, batch["tokens"], *inputs)
    sources = batch.get("source_ids"), num_sources
    return loss_sums(logits, batch["targets"], batch["loss_mask"], *sources)


def _find(find_patches, entropy_params, batch):
    """The batch's PatchBuffers and `patch_counts`; None and nothing if it brings its patches."""
    if find_patches is None:
        return None, {}
    patches = find_patches(entropy_params, batch["tokens"], batch["document_ids"])
    return patches, patch_counts(batch["tokens"], patches)
