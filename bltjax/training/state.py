"""State of training: step number, parameters, optimizer state, health of the run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bltjax.model import functional


class Health(NamedTuple):
    """Running means and counts, scalars, that tell unusual updates apart; see `step.is_usual`."""

    loss: jax.Array  # float32, running mean over the updates that were made
    grad_norm: jax.Array  # float32, the same
    updates: jax.Array  # int32, number of updates made
    skipped: jax.Array  # int32, number of updates left out
    skipped_in_a_row: jax.Array  # int32, left out since the last one made


class TrainState(NamedTuple):
    step: jax.Array  # int32, completed steps
    params: dict
    opt_state: Any
    health: Health


def create_state(model_config, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Creates a fresh state, sharded over the devices from the start; no host holds all of it."""
    return start_state(functional.init(model_config, jax.random.key(seed)), optimizer)


def start_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Makes the state before the first step from parameters, whose memory it takes over."""
    return jax.jit(lambda params: _start(params, optimizer), donate_argnums=0)(params)


def abstract_state(model_config, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns shapes, dtypes and shardings of `create_state`'s result."""
    params = functional.abstract_params(model_config)
    return jax.eval_shape(lambda params: _start(params, optimizer), params)


def _start(params, optimizer):
    number, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    health = Health(number, number, count, count, count)
    return TrainState(count, params, optimizer.init(params), health)
