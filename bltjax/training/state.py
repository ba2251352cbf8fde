"""What a training step changes: step number, parameters, optimizer state, health of the run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bltjax.model import functional


class Health(NamedTuple):
    """What tells a usual update from one to leave out; scalars, see `step.is_usual`."""

    loss: jax.Array  # float32, running mean over the updates that were made
    grad_norm: jax.Array  # float32, the same
    updates: jax.Array  # int32, how many were made
    skipped: jax.Array  # int32, how many were left out
    skipped_in_a_row: jax.Array  # int32, up to now


class TrainState(NamedTuple):
    step: jax.Array  # int32, completed steps
    params: dict
    opt_state: Any
    health: Health


def create_state(model_config, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state, created on the devices already sharded; no host ever holds all of it."""
    return start_state(functional.init(model_config, jax.random.key(seed)), optimizer)


def start_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step from parameters, which it takes over."""
    return jax.jit(lambda params: _start(params, optimizer), donate_argnums=0)(params)


def abstract_state(model_config, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of `create_state`'s result."""
    params = functional.abstract_params(model_config)
    return jax.eval_shape(lambda params: _start(params, optimizer), params)


def _start(params, optimizer):
    number, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    health = Health(number, number, count, count, count)
    return TrainState(count, params, optimizer.init(params), health)
