"""One training step and one evaluation step, for all models.

A batch is a dict of arrays with rows sharded over the mesh: tokens, targets, document_ids int32
[B, L], loss_mask bool [B, L] and, for the byte latent transformer, patch_lengths int32 [B, P]
unless the step finds the patches itself. Where it has source_ids int32 [B, L], nats and bytes are
told by source. Shapes never depend on the text, so each step is compiled once.
"""

import jax
import jax.numpy as jnp
import optax

from bltjax import sharding
from bltjax.config import TrainingConfig
from bltjax.model import functional
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.runtime.heap import give_back_after_compiling
from bltjax.training import sparse_hash_updates
from bltjax.training.loss import bits_per_byte, loss_sums
from bltjax.training.optimizer import HASH_TABLES, learning_rate
from bltjax.training.patch_finder import patch_counts
from bltjax.training.state import Health, TrainState
from bltjax.vocabulary import PAD_ID

HEALTH_UPDATES = 20  # before a loss or a gradient can be called unusual


def make_train_step(
    model_config,
    config: TrainingConfig,
    optimizer: optax.GradientTransformation,
    find_patches=None,
    num_sources: int = 1,
    byte_lengths=None,
):
    """jitted (state, batch) -> (state, metrics); the old state's memory is reused.

    The loss is the mean over the targets of the batch, however many parts it goes through the
    devices in. With `find_patches`, from `make_patch_finder`, the step is (state, batch,
    entropy_params) and its metrics tell how many patches did not fit. A batch may hold int32 [B]
    `stop`; the metrics then have its maximum. byte_lengths: of `loss_sums`, where ids are tokens.
    """
    give_back_after_compiling()
    can_skip = config.skip_loss_above or config.skip_norm_above

    def part_gradients(params, part, entropy_params):
        patches = _find(find_patches, entropy_params, part)

        def objective(params):
            sums = batch_sums(
                model_config, params, part, patches, num_sources, config.z_loss, byte_lengths
            )
            return sums["nats"] + config.z_loss * sums.pop("z", 0.0), sums

        return jax.grad(objective, has_aux=True)(params)

    def gradients(params, batch, entropy_params):
        """Summed over targets, and the sums of the batch."""
        if config.accumulation_steps == 1:
            return part_gradients(params, batch, entropy_params)
        parts = sharding.micro_batches(batch, config.accumulation_steps)

        def add(total, part):
            return jax.tree.map(jnp.add, total, part_gradients(params, part, entropy_params)), None

        part = jax.tree.map(lambda x: x[0], parts)
        _, sums = jax.eval_shape(part_gradients, params, part, entropy_params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
        return jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, params), zeros), parts)[0]

    def train_step(state: TrainState, batch, entropy_params=None):
        grads, sums = gradients(state.params, batch, entropy_params)
        targets = jnp.maximum(sums["targets"], 1)
        grads = jax.tree.map(lambda g: g / targets, grads)
        metrics = _metrics(sums, batch) | dict(
            loss=sums["nats"] / targets,
            grad_norm=optax.tree.norm(grads),
            learning_rate=learning_rate(config.optimizer, state.health.updates, config.steps),
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, opt_state, state.health)
        if can_skip:
            usual = is_usual(config, state.health, metrics["loss"], metrics["grad_norm"])
            kept = jax.tree.map(lambda a, b: jnp.where(usual, a, b), new, state)
            health = _next_health(state.health, usual, metrics["loss"], metrics["grad_norm"])
            new = kept._replace(step=new.step, health=health)
            metrics["skipped"] = health.skipped
            metrics["skipped_in_a_row"] = health.skipped_in_a_row
        else:
            new = new._replace(health=state.health._replace(updates=state.health.updates + 1))
        if "stop" in batch:
            metrics["stop"] = jnp.max(batch["stop"])
        return new, metrics

    def touched_step(state: TrainState, batch, entropy_params=None):
        if HASH_TABLES not in state.params:
            return train_step(state, batch, entropy_params)
        tables = state.params[HASH_TABLES]["weight"]
        ids, places = sparse_hash_updates.find_rows(model_config.hash, batch["tokens"], tables)
        rows = sparse_hash_updates.catch_up(config, sparse_hash_updates.take_rows(state, ids))
        new, metrics = train_step(rows, batch | dict(ngram_places=places), entropy_params)
        if can_skip:  # what was caught up is left out too: ids beyond the last row write nothing
            beyond = ids + tables.shape[0] * tables.shape[1]
            ids = jnp.where(new.health.skipped_in_a_row > 0, beyond, ids)
        return sparse_hash_updates.put_rows(state, new, ids), metrics

    dense = config.optimizer.hash_updates == "dense"
    return jax.jit(train_step if dense else touched_step, donate_argnums=0)


def is_usual(config: TrainingConfig, health: Health, loss, grad_norm):
    """Whether an update is to be made: neither loss nor gradient norm is far above its mean.

    Until HEALTH_UPDATES have been made there is no mean to go by, and only what is not finite is
    left out.
    """
    usual = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    known = health.updates >= HEALTH_UPDATES
    for limit, value, mean in (
        (config.skip_loss_above, loss, health.loss),
        (config.skip_norm_above, grad_norm, health.grad_norm),
    ):
        if limit:
            usual &= ~known | (value <= limit * mean)
    return usual


def _next_health(health: Health, usual, loss, grad_norm) -> Health:
    # The mean of all updates at first, then one that forgets.
    weight = 1 / jnp.minimum(health.updates + 1, 2 * HEALTH_UPDATES).astype(jnp.float32)

    def moved(mean, value):
        return jnp.where(usual, mean + weight * (value - mean), mean)

    return Health(
        loss=moved(health.loss, loss),
        grad_norm=moved(health.grad_norm, grad_norm),
        updates=health.updates + usual,
        skipped=health.skipped + ~usual,
        skipped_in_a_row=jnp.where(usual, 0, health.skipped_in_a_row + 1),
    )


def _metrics(sums: dict, batch: dict) -> dict:
    """What is told of the sums of a batch."""
    metrics = dict(
        bits_per_byte=bits_per_byte(sums),
        bytes=sums["bytes"],
        byte_utilisation=sums["inputs"] / batch["tokens"].size,
    )
    metrics |= {k: v for k, v in sums.items() if k.startswith("source_")}
    if "tokens" in sums:
        metrics["mean_token_bytes"] = sums["bytes"] / jnp.maximum(sums["tokens"], 1)
    if "patches" in sums:
        metrics["patch_utilisation"] = (sums["patches"] - sums["overflow"]) / sums["patch_slots"]
        metrics["mean_patch_bytes"] = sums["inputs"] / jnp.maximum(sums["patches"], 1)
        metrics["overflow"] = sums["overflow"]
    return metrics


def make_eval_step(model_config, find_patches=None, num_sources: int = 1, byte_lengths=None):
    """jitted (params, batch) -> `batch_sums`; byte_lengths: of `loss_sums`, where ids are tokens.

    With `find_patches` it is (params, batch, entropy_params).
    """

    def eval_step(params, batch, entropy_params=None):
        patches = _find(find_patches, entropy_params, batch)
        return batch_sums(
            model_config, params, batch, patches, num_sources, byte_lengths=byte_lengths
        )

    return jax.jit(eval_step)


def batch_sums(
    model_config, params, batch, patches=None, num_sources: int = 1, z_loss=0.0, byte_lengths=None
):
    """Forward pass of a model over a batch -> `loss_sums`, inputs and `patch_counts`.

    patches: PatchBuffers, where the batch has no patch_lengths.
    """
    if patches is None and "patch_lengths" in batch:
        patches = buffers_from_lengths(batch["patch_lengths"], batch["tokens"].shape[1])
    inputs = [batch["document_ids"]] if patches is None else [patches, batch["document_ids"]]
    known = {}
    if "ngram_places" in batch:  # then params hold rows of the tables
        rows, dtype = params[HASH_TABLES]["weight"], model_config.compute_dtype
        known["ngrams"] = sparse_hash_updates.sum_rows(rows, batch["ngram_places"], dtype)
    logits = functional.apply(model_config, params, batch["tokens"], *inputs, **known)
    sums = loss_sums(
        logits,
        batch["targets"],
        batch["loss_mask"],
        batch.get("source_ids"),
        num_sources,
        with_z=bool(z_loss),
        byte_lengths=byte_lengths,
    )
    if patches is not None:
        return sums | patch_counts(batch["tokens"], patches)
    return sums | dict(inputs=jnp.sum(batch["tokens"] != PAD_ID, dtype=jnp.float32))


def _find(find_patches, entropy_params, batch):
    """The batch's PatchBuffers; None if it brings its patches."""
    if find_patches is None:
        return None
    return find_patches(entropy_params, batch["tokens"], batch["document_ids"])
