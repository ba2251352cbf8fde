"""AdamW, the published learning-rate schedules, and global-norm clipping (spec 8.1)."""

import jax.numpy as jnp
import optax

from bltjax.config import OptimizerConfig


def schedule_multiplier(config: OptimizerConfig, step, num_steps: int):
    """Share of the peak learning rate at `step` completed steps, so 0 at the first step.

    step: int or traced int32. The wsd schedule decays to `min_ratio` within `decay_fraction`,
    which the published one means to do but stops short of (spec 8.1).
    """
    warmup, ratio = config.warmup_steps, config.min_ratio
    if config.schedule == "constant":
        return jnp.ones_like(step, jnp.float32)
    step = jnp.minimum(step, num_steps - 1)
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if config.schedule == "cosine":
        half_cycles = jnp.floor(step / (num_steps * config.cycle_length))
        sign = jnp.where(half_cycles % 2 == 1, -1.0, 1.0)
        angle = jnp.pi * jnp.maximum(progress, 0) ** config.cosine_theta / config.cycle_length
        after = ratio + 0.5 * (1 - ratio) * (sign * jnp.cos(angle) + 1)
    elif config.schedule == "linear":
        after = progress * ratio + 1 - progress
    elif config.schedule == "inv_sqrt":
        steps = jnp.maximum(step, 1)
        after = jnp.maximum((warmup / steps) ** config.exp_factor, ratio)
    else:
        decay_steps = max(int(num_steps * config.decay_fraction), 1)
        done = jnp.clip((step - (num_steps - decay_steps)) / decay_steps, 0, 1)
        after = 1 / (done / ratio + 1 - done)
    return jnp.where(step < warmup, step / max(warmup, 1), after)


def learning_rate(config: OptimizerConfig, step, num_steps: int):
    """The learning rate at `step` completed steps."""
    return config.learning_rate * schedule_multiplier(config, step, num_steps)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decay on every parameter, as published."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda step: learning_rate(config, step, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        ),
    )
