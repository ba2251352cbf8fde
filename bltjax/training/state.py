"""What a training step changes: step number, parameters, optimizer state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bltjax.model import functional


class TrainState(NamedTuple):
    step: jax.Array  # int32, completed steps
    params: dict
    opt_state: Any


def create_state(model_config, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state, created on the devices already sharded; no host ever holds all of it."""
    params = functional.init(model_config, jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def abstract_state(model_config, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of `create_state`'s result."""
    params = functional.abstract_params(model_config)
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params)
    )
