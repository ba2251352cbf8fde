"""AdamW with the published schedules and clipping, and a rate for each part (model.md#optimizer).

Names of parameters are the published ones, such as `local_encoder.layers.ffn_norm.weight`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bltjax.checkpoints.fingerprints import named_leaves
from bltjax.config import OptimizerConfig
from bltjax.config.model import HASH_TABLES
from bltjax.model.lora import is_adapter
from bltjax.training.muon import scale_by_muon

PARTS = {  # by the first word of a parameter's name
    "global_transformer": "global",
    "local_encoder": "local",
    "local_decoder": "local",
    HASH_TABLES: "hash",
    # The entropy model and token models are one part, which always learns at the plain rate.
    "tok_embeddings": "entropy",
    "layers": "entropy",
    "norm": "entropy",
    "output": "entropy",
    "hash_projection": "entropy",
}


def schedule_multiplier(config: OptimizerConfig, step, num_steps: int):
    """Returns the share of the peak learning rate after `step` steps, so 0 at the first step.

    step: int or traced int32. The wsd schedule decays to `min_ratio` within `decay_fraction`;
    the published one is meant to, but stops short.
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
    """Returns the learning rate after `step` completed steps."""
    return config.learning_rate * schedule_multiplier(config, step, num_steps)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Makes clipping by global norm, then AdamW, with rates and decay by part.

    The defaults are as published. Gradients and updates are those of the parameters that learn
    (`learning`), and others have no state. The state of a parameter is sharded as the parameter is.
    """
    rates = _rates(config)

    def decay_and_rate(name, update, param):
        decayed = update + config.weight_decay * param if decays(config, name) else update
        return rates[part_of(name)] * decayed

    counting = [_count_row_updates()] if config.hash_updates == "touched" else []
    rules = optax.chain(
        *counting,
        optax.clip_by_global_norm(config.clip_norm),
        # A chain of its own, so that the state is the one that optax.adamw has.
        optax.chain(
            _scale_by_moments(config),
            optax.stateless(lambda updates, params: _map_named(decay_and_rate, updates, params)),
            optax.scale_by_learning_rate(lambda step: learning_rate(config, step, num_steps)),
        ),
    )
    return optax.GradientTransformation(
        lambda params: rules.init(learning(config, params)),
        lambda grads, state, params: rules.update(grads, state, learning(config, params)),
    )


class RowUpdates(NamedTuple):
    """State of `_count_row_updates`."""

    counts: dict  # by name: int32 [T, rows], number of updates of each row of a hash table


def _count_row_updates() -> optax.GradientTransformation:
    """Counts the updates of each row of the hash tables, since a sparse step updates only some."""

    def init(params):
        tables = {HASH_TABLES: params[HASH_TABLES]} if HASH_TABLES in params else {}
        return RowUpdates(jax.tree.map(lambda x: jnp.zeros(x.shape[:2], jnp.int32), tables))

    return optax.GradientTransformation(
        init, lambda updates, state, params=None: (updates, jax.tree.map(lambda n: n + 1, state))
    )


def learning(config: OptimizerConfig, params: dict) -> dict:
    """Returns the parameters that learn: of parts whose rate is not 0, and of these alone the
    adapters, where there are some.
    """
    rates, found = _rates(config), {}
    leaves = named_leaves(params)
    adapted = any(map(is_adapter, leaves))
    for name, leaf in leaves.items():
        if rates[part_of(name)] and (is_adapter(name) or not adapted):
            *groups, last = name.split(".")
            group = functools.reduce(lambda tree, key: tree.setdefault(key, {}), groups, found)
            group[last] = leaf
    return found


def part_of(name: str) -> str:
    """Returns the part of a model that a parameter belongs to, one of the values of PARTS.

    Raises ValueError for an unknown parameter.
    """
    if "token_embedding_projection" in name:  # reads local vectors
        return "local"
    if (first := name.split(".")[0]) not in PARTS:
        raise ValueError(f"parameter {name} is of no known part of a model: add it to PARTS")
    return PARTS[first]


def decays(config: OptimizerConfig, name: str) -> bool:
    """Tells whether weight decay acts on a parameter."""
    if part_of(name) == "hash":
        return config.decay_hash_tables
    module = name.split(".")[-2]
    if "norm" in module.split("_") or name.endswith(".bias"):  # ffn_norm, cross_attn_norm_q
        return config.decay_norms
    return config.decay_embeddings or module not in ("tok_embeddings", "mask_embedding")


def _rates(config: OptimizerConfig) -> dict[str, float]:
    return {
        "global": config.global_rate,
        "local": config.local_rate,
        "hash": config.hash_rate,
        "entropy": 1.0,
    }


def _scale_by_moments(config: OptimizerConfig) -> optax.GradientTransformation:
    """Scales by Adam's moments, smaller ones for hash tables where asked.

    Matrices may have Muon's momentum instead.
    """
    rates = _rates(config)
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    muon = config.matrices == "muon"
    if config.hash_moments == "float32" and all(rates.values()) and not muon:
        return adam
    hash_rules = dict(float32=adam, bfloat16=_held_in_bfloat16(adam), factored=_factored(config))

    def rule(name, param):
        if muon and is_matrix_of_layers(name, param) and not is_adapter(name):
            return "muon"
        return "hash" if part_of(name) == "hash" else "adam"

    # "frozen" has nothing: checkpoints of earlier versions have a state of it.
    rules = dict(adam=adam, hash=hash_rules[config.hash_moments], frozen=optax.set_to_zero())
    if muon:  # a state for it would not be that of checkpoints of runs without it
        rules["muon"] = scale_by_muon()
    return optax.partition(
        rules,
        lambda params: _map_named(rule, params),
    )


def is_matrix_of_layers(name: str, param) -> bool:
    """Tells whether a parameter maps vectors to vectors, within a stack or between two."""
    *modules, _ = name.split(".")
    stacked = "layers" in modules or "cross_attn_layers" in modules
    return (stacked and param.ndim == 3) or modules[-1].endswith("_projection")


def _held_in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps Adam, which computes in float32: its moments are bfloat16 between steps."""

    def cast(state, dtype):
        mu, nu = optax.tree.cast((state.mu, state.nu), dtype)
        return state._replace(mu=mu, nu=nu)

    def update(updates, state, params=None):
        updates, state = adam.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, jnp.bfloat16)

    return optax.GradientTransformation(lambda p: cast(adam.init(p), jnp.bfloat16), update)


def _factored(config: OptimizerConfig) -> optax.GradientTransformation:
    """Scales by Adafactor's second moments of each table's rows and features; no first moment.

    Moments are averaged with Adam's beta2 and its correction: Adafactor's own average forgets ever
    more slowly, and most rows are idle in most steps, so that one which comes up late would find a
    moment near 0 and leap. A row now moves at most by 1 / sqrt(1 - beta2) rates, about what Adam's
    first moment adds up to over the steps that follow. Where the product of row and feature moments
    misses the whole moment, an update could be larger, and is clipped by row: the mean over a table
    would mostly be of idle rows.
    """

    def beta2(step, beta):
        return beta * (1 - beta**step) / (1 - beta ** (step + 1.0))

    def clip_rows(update):
        size = jnp.sqrt(jnp.mean(update**2, axis=-1, keepdims=True))
        return update / jnp.maximum(1.0, size * (1 - config.beta2) ** 0.5)

    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=config.beta2,
            decay_rate_fn=beta2,
            # The two longest axes are factored: rows and features, unless tables outnumber these.
            min_dim_size_to_factor=1,
            # Added to squares; where it is lost to float32, idle rows become 0 / 0.
            epsilon=max(config.epsilon**2, 1e-30),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(clip_rows, updates)),
    )


def _map_named(function, *trees):
    """Maps function(name, *leaves) over trees, as jax.tree.map does."""

    def named(path, *leaves):
        return function(jax.tree_util.keystr(path, simple=True, separator="."), *leaves)

    return jax.tree_util.tree_map_with_path(named, *trees)
