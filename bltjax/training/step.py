"""The training step and the evaluation step of all models.

A batch is a dict of arrays whose rows are sharded over the mesh: tokens, targets, document_ids
int32 [B, L], loss_mask bool [B, L], and for the byte latent transformer patch_lengths int32 [B, P],
unless the step finds the patches itself. With source_ids int32 [B, L] the metrics also hold nats
and bytes of each source. Shapes never depend on the text, so each step is compiled once.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from bltjax import sharding
from bltjax.config import TrainingConfig
from bltjax.model import functional
from bltjax.model.lora import overlaid
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.runtime.heap import give_back_after_compiling
from bltjax.training import block_diffusion
from bltjax.training.loss import bits_per_byte, loss_sums
from bltjax.training.optimizer import HASH_TABLES, learning, learning_rate
from bltjax.training.patch_finder import patch_counts
from bltjax.training.sparse_hash_updates import sparse_hash_step, sum_rows
from bltjax.training.state import Health, TrainState
from bltjax.training.teacher import means, taught_logits, weighted
from bltjax.vocabulary import PAD_ID

HEALTH_UPDATES = 20  # before a loss or a gradient can be called unusual


def make_train_step(
    model_config,
    config: TrainingConfig,
    optimizer: optax.GradientTransformation,
    find_patches=None,
    num_sources: int = 1,
    byte_lengths=None,
    row_tokens: int | None = None,
):
    """Returns the jitted (state, batch) -> (state, metrics), which reuses the old state's memory.

    The loss is the mean over the targets of the batch, in however many parts it is computed. With
    `find_patches`, from `make_patch_finder`, the step is (state, batch, entropy_params), and its
    metrics count the patches that did not fit. Where a batch holds int32 [B] `stop`, the metrics
    hold its maximum. byte_lengths: see `loss_sums`, where ids are tokens. With `row_tokens`, those
    of a `Teacher`, the step has one more argument, the teacher's arrays, and a batch has int32
    [B, L] `teacher_tokens`.
    """
    give_back_after_compiling()
    constant = num_sources, byte_lengths, row_tokens
    gradients = _gradients(model_config, config, find_patches, *constant)
    if config.accumulation_steps > 1:
        gradients = _accumulated(gradients, config.accumulation_steps)
    update = _updating(config, optimizer)
    if config.skip_loss_above or config.skip_norm_above:
        update = _guarded(config, update)
    sparse = config.optimizer.hash_updates == "touched"
    blocks = block_diffusion.has_blocks(model_config, config)

    def train_step(state: TrainState, batch, entropy_params=None, teacher=None):
        key = None
        if model_config.lora.dropout:
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if blocks:
            drawn = block_diffusion.noise(model_config, config.seed, state.step, batch["tokens"])
            batch = batch | dict(block_noise=drawn)
        if teacher is not None:
            teacher = teacher | dict(fed=state.step < config.teacher.feed * config.steps)
        further = entropy_params, key, teacher
        if sparse and HASH_TABLES in learning(config.optimizer, state.params):
            return sparse_hash_step(model_config, config, gradients, update, further, state, batch)
        grads, sums = gradients(state.params, batch, *further)
        return update(state, grads, sums, batch)

    return jax.jit(train_step, donate_argnums=0)


def _gradients(model_config, config, find_patches, num_sources, byte_lengths, row_tokens):
    """Returns (params, batch, entropy_params, key, teacher) -> gradients summed over targets,
    `batch_sums`.

    key: of the dropout of adapters, or None. teacher: its arrays, or None. Gradients are those of
    the parameters that learn, see `optimizer.learning`.
    """
    z_loss, blocks = config.z_loss, block_diffusion.has_blocks(model_config, config)

    def gradients(params, batch, entropy_params, key, teacher):
        rows = batch["tokens"], batch["document_ids"]
        found = find_patches and find_patches(entropy_params, *rows)

        def objective(learned):
            every = overlaid(params, learned)
            forward, added = None, lambda sums: 0.0
            if teacher is not None:
                forward = functools.partial(
                    taught_logits, model_config, config.teacher, row_tokens, every, teacher
                )
                added = functools.partial(weighted, config.teacher)
            elif blocks:
                forward = functools.partial(
                    block_diffusion.logits_and_sums, model_config, config.diffusion, every
                )
                added = functools.partial(block_diffusion.weighted, config.diffusion)
            constant = num_sources, z_loss, byte_lengths
            sums = batch_sums(model_config, every, batch, found, *constant, key, forward)
            loss = sums["nats"] + z_loss * sums.pop("z", 0.0)
            return loss + added(sums), sums

        return jax.grad(objective, has_aux=True)(learning(config.optimizer, params))

    return gradients


def _accumulated(gradients, num_parts: int):
    """Wraps `gradients`: a batch goes through in parts, one after the other, and is summed up."""

    def accumulated(params, batch, entropy_params, key, teacher):
        parts = sharding.micro_batches(batch, num_parts)
        keys = None if key is None else jax.random.split(key, num_parts)

        def add(total, part):
            batch, key = part
            found = gradients(params, batch, entropy_params, key, teacher)
            return jax.tree.map(jnp.add, total, found), None

        part, key = jax.tree.map(lambda x: x[0], (parts, keys))
        like, sums = jax.eval_shape(gradients, params, part, entropy_params, key, teacher)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), like)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
        return jax.lax.scan(add, (zeros, nothing), (parts, keys))[0]

    return accumulated


def _updating(config: TrainingConfig, optimizer):
    """Returns (state, gradients, sums, batch) -> (state, metrics), which makes one update."""

    def update(state: TrainState, grads, sums, batch):
        targets = jnp.maximum(sums["targets"], 1)
        grads = jax.tree.map(lambda g: g / targets, grads)
        metrics = _metrics(sums, batch) | dict(
            loss=sums["nats"] / targets,
            grad_norm=optax.tree.norm(grads),
            learning_rate=learning_rate(config.optimizer, state.health.updates, config.steps),
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        learned = optax.apply_updates(learning(config.optimizer, state.params), updates)
        params = overlaid(state.params, learned)
        health = state.health._replace(updates=state.health.updates + 1)
        return TrainState(state.step + 1, params, opt_state, health), metrics

    return update


def _guarded(config: TrainingConfig, update):
    """Wraps `update`: an update that is not `is_usual` is left out, and counted."""

    def guarded_update(state: TrainState, *inputs):
        new, metrics = update(state, *inputs)
        loss, grad_norm = metrics["loss"], metrics["grad_norm"]
        usual = is_usual(config, state.health, loss, grad_norm)
        kept = jax.tree.map(lambda a, b: jnp.where(usual, a, b), new, state)
        health = _next_health(state.health, usual, loss, grad_norm)
        counts = dict(skipped=health.skipped, skipped_in_a_row=health.skipped_in_a_row)
        return kept._replace(step=new.step, health=health), metrics | counts

    return guarded_update


def is_usual(config: TrainingConfig, health: Health, loss, grad_norm):
    """Tells whether neither loss nor gradient norm is far above its mean, so to make the update.

    Before HEALTH_UPDATES updates only loss and norm that are not finite are unusual.
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
    # A plain mean at first, then an exponential moving average.
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
    """Metrics from `batch_sums` and the batch."""
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
    if "taught" in sums:
        metrics |= means(sums)
    if "blocks" in sums:
        metrics |= block_diffusion.means(sums)
    if "stop" in batch:
        metrics["stop"] = jnp.max(batch["stop"])
    return metrics


def make_eval_step(model_config, find_patches=None, num_sources: int = 1, byte_lengths=None):
    """Returns the jitted (params, batch) -> `batch_sums`.

    With `find_patches` it is (params, batch, entropy_params). byte_lengths: see `loss_sums`.
    """

    def eval_step(params, batch, entropy_params=None):
        rows = batch["tokens"], batch["document_ids"]
        found = find_patches and find_patches(entropy_params, *rows)
        return batch_sums(model_config, params, batch, found, num_sources, 0.0, byte_lengths)

    return jax.jit(eval_step)


def batch_sums(
    model_config,
    params,
    batch,
    patches=None,
    num_sources: int = 1,
    z_loss=0.0,
    byte_lengths=None,
    dropout_key=None,
    forward=None,
):
    """Runs a model over a batch -> `loss_sums` and `patch_counts`; without patches, `inputs`.

    patches: PatchBuffers, where the batch has no patch_lengths. forward: (batch, patches) -> logits
    and more sums, in the place of the model, see `teacher.taught_logits`.
    """
    if patches is None and "patch_lengths" in batch:
        patches = buffers_from_lengths(batch["patch_lengths"], batch["tokens"].shape[1])
    inputs = [batch["document_ids"]] if patches is None else [patches, batch["document_ids"]]
    known = {} if dropout_key is None else dict(dropout_key=dropout_key)
    if "ngram_places" in batch:  # then params hold only the rows of the tables that it reads
        rows, dtype = params[HASH_TABLES]["weight"], model_config.compute_dtype
        known["ngrams"] = sum_rows(rows, batch["ngram_places"], dtype)
    more = {}
    if forward is None:
        logits = functional.apply(model_config, params, batch["tokens"], *inputs, **known)
    else:
        logits, more = forward(batch, patches, **known)
    targets = batch["targets"], batch["loss_mask"], batch.get("source_ids")
    sums = loss_sums(logits, *targets, num_sources, bool(z_loss), byte_lengths) | more
    if patches is not None:
        return sums | patch_counts(batch["tokens"], patches)
    return sums | dict(inputs=jnp.sum(batch["tokens"] != PAD_ID, dtype=jnp.float32))
