"""Low-rank adapters of linear layers: W + scale B A, of which A and B learn (docs/finetuning.md).

In training an adapter has its own products, so that no gradient of a whole matrix exists, and its
input may lose features (dropout). Elsewhere it is added to its matrix.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from bltjax import sharding
from bltjax.config.lora import LoRAConfig
from bltjax.model.parameters import Linear, Matrix

A, B = "lora_A", "lora_B"  # PEFT's names


def is_adapter(name: str) -> bool:
    """Tells whether a parameter is one of an adapter."""
    return name.endswith((f".{A}.weight", f".{B}.weight"))


def matches(name: str, pattern: str) -> bool:
    """Tells whether a pattern means a matrix, such as `local_encoder.layers.attention.wq.weight`.

    Layers have no numbers here, as one stack has adapters in all of them: `layers.*.` and `layers.`
    mean the same.
    """
    return fnmatch.fnmatchcase(name, re.sub(r"(layers)\.\*\.", r"\1.", pattern))


def matrices(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Yields the linear layers of a model with the names of their matrices, in order of names."""
    found = {
        f"{'.'.join(map(str, path))}.weight": node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, Linear)
    }
    yield from sorted(found.items())


def add_adapters(model: nnx.Module, config: LoRAConfig, key):
    """Adds adapters, which change nothing yet, to the matrices that a config names."""
    for i, (name, linear) in enumerate(matrices(model)):
        if any(matches(name, pattern) for pattern in config.targets):
            _adapt(linear, config, jax.random.fold_in(key, i))


def _adapt(linear: Linear, config: LoRAConfig, key):
    """Gives a layer, or a stack of them, an adapter with PEFT's initial values."""
    *stack, out_dim, in_dim = linear.weight.shape
    out_axis, in_axis = linear.axes
    layers, bound = (None,) * len(stack), in_dim**-0.5
    shape, spec = (*stack, config.rank, in_dim), sharding.spec(*layers, None, in_axis)
    down = jax.random.uniform(key, shape, jnp.float32, -bound, bound, out_sharding=spec)
    shape, spec = (*stack, out_dim, config.rank), sharding.spec(*layers, out_axis, None)
    linear.lora_A, linear.lora_B = Matrix(down), Matrix(jnp.zeros(shape, out_sharding=spec))
    linear.lora_scale, linear.dropout = config.scale, config.dropout


def set_dropout(model: nnx.Module, key):
    """Lets the adapters of a model leave out inputs, which ones by a key."""
    for i, (_, linear) in enumerate(matrices(model)):
        if hasattr(linear, A):
            own, stack = jax.random.fold_in(key, i), linear.weight.shape[:-2]
            linear.dropout_key = nnx.Variable(jax.random.split(own, stack) if stack else own)


def only_adapters(params: dict) -> dict:
    """Returns the parameters of adapters, at their paths."""
    found = {}
    for name, x in params.items():
        part = x if name in (A, B) else only_adapters(x) if isinstance(x, dict) else {}
        found |= {name: part} if part else {}
    return found


def overlaid(params: dict, over: dict) -> dict:
    """Returns nested parameters with those of `over` in their places, or added."""
    found = dict(params)
    for name, x in over.items():
        found[name] = overlaid(params.get(name, {}), x) if isinstance(x, dict) else x
    return found


def without_adapters(config):
    """Returns the config of a model without adapters."""
    return dataclasses.replace(config, lora=LoRAConfig()) if config.lora.rank else config


def merged(config, params: dict) -> tuple:
    """Returns config and parameters of a model whose adapters are added to their matrices."""
    if not config.lora.rank:
        return config, params
    return without_adapters(config), jax.jit(_merged, static_argnums=0)(config.lora, params)


def _merged(config: LoRAConfig, params):
    if not isinstance(params, dict):
        return params
    if A not in params:
        return {name: _merged(config, x) for name, x in params.items()}
    weight = params["weight"]
    down, up = (params[name]["weight"].astype(jnp.float32) for name in (A, B))
    product = jnp.einsum("...or,...ri->...oi", up, down, out_sharding=jax.typeof(weight).sharding)
    others = {name: x for name, x in params.items() if name not in (A, B)}
    return others | dict(weight=(weight + config.scale * product).astype(weight.dtype))
