"""The waist: models as pure functions of a config and a nested dict of arrays.

Nothing outside `bltjax/model/` knows which module system holds the parameters.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig
from bltjax.model import incremental
from bltjax.model.blt import BLT
from bltjax.model.entropy_model import EntropyModel

_STACKED = {"layers", "cross_attn_layers"}  # parameters with a leading layer axis


def init(config: BLTConfig | EntropyModelConfig, key: jax.Array) -> dict:
    """Initial parameters (spec 6): nested dict of float32 arrays, created sharded over the mesh.

    Paths are the published names, with layers stacked on a leading axis.
    """
    return jax.jit(lambda key: _parameters(config, key))(key)


def abstract_params(config: BLTConfig | EntropyModelConfig) -> dict:
    """Shapes, dtypes and shardings of `init`'s result, without computing anything."""
    return _abstract_params(config, jax.sharding.get_abstract_mesh())


def apply(
    config: BLTConfig | EntropyModelConfig, params: dict, tokens: jax.Array, *inputs, **known
):
    """Float32 next-byte logits [B, L, V] of tokens int32 [B, L].

    For a BLTConfig `inputs` are the PatchBuffers and, optionally, document ids [B, L]; for an
    EntropyModelConfig, optionally, segment ids [B, L]. Without ids a document ends at its EOS.
    known: `ngrams` of `BLT.__call__`, whose hash tables are then not read.
    """
    return intermediates(config, params, tokens, *inputs, **known)["logits"]


def intermediates(config, params, tokens, *inputs, **known) -> dict:
    """Everything a forward pass computes, by name; see `BLT.__call__`."""
    tokens, inputs = sharding.shard_rows((tokens, inputs))
    return _merged(config, params)(tokens, *inputs, **known)


def read_tokens(config: EntropyModelConfig, params: dict, *inputs):
    """`incremental.read_tokens` with these parameters."""
    return incremental.read_tokens(_merged(config, params), *inputs)


def token_logits(config: EntropyModelConfig, params: dict, states):
    """`incremental.token_logits` with these parameters."""
    return incremental.token_logits(_merged(config, params), states)


def read_bytes(config: BLTConfig, params: dict, *inputs):
    """`incremental.read_bytes` with these parameters."""
    return incremental.read_bytes(_merged(config, params), *inputs)


def close_patches(config: BLTConfig, params: dict, *inputs):
    """`incremental.close_patches` with these parameters."""
    return incremental.close_patches(_merged(config, params), *inputs)


def predict(config: BLTConfig, params: dict, *inputs):
    """`incremental.predict` with these parameters."""
    return incremental.predict(_merged(config, params), *inputs)


def apart(params: dict) -> dict:
    """Parameters with each layer on its own, and matrices transposed; `together` undoes the latter.

    For loops on CPUs: of stacked layers each step copies the one that it needs, and a product with
    few rows is up to half again as fast where a matrix lies [in, out].
    """

    def split(name, tree):
        if name in _STACKED:
            num_layers = len(jax.tree.leaves(tree)[0])
            layers = (jax.tree.map(lambda w, i=i: w[i], tree) for i in range(num_layers))
            return tuple(jax.tree.map(_transposed, layer) for layer in layers)
        if isinstance(tree, dict):
            return {name: split(name, part) for name, part in tree.items()}
        return tree

    return split(None, params)


def together(params: dict) -> dict:
    """What the functions above take, of parameters that may be `apart`."""
    if isinstance(params, tuple):
        return tuple(jax.tree.map(_transposed, layer) for layer in params)
    if isinstance(params, dict):
        return {name: together(part) for name, part in params.items()}
    return params


def _transposed(w):
    return jnp.swapaxes(w, 0, 1) if w.ndim == 2 else w


def _merged(config, params):
    params = jax.tree.map(jnp.asarray, together(params))  # weights may come as NumPy arrays
    model = nnx.merge(_graphdef(config), _with_first_layers(params))
    _put_layers(model, params)
    return model


def _with_first_layers(tree):
    """The tree with the first layer for all, where they are not stacked."""
    if isinstance(tree, dict):
        return {name: _with_first_layers(part) for name, part in tree.items()}
    return tree[0] if isinstance(tree, tuple) else tree


def _put_layers(module, tree: dict):
    """Puts layers that are not stacked where that first one is."""
    for name, part in tree.items():
        if isinstance(part, dict):
            _put_layers(getattr(module, name), part)
        elif isinstance(part, tuple):
            graphdef = nnx.graphdef(getattr(module, name))
            setattr(module, name, nnx.List([nnx.merge(graphdef, layer) for layer in part]))


def _build(config, key):
    return (BLT if isinstance(config, BLTConfig) else EntropyModel)(config, key)


def _parameters(config, key):
    return nnx.to_pure_dict(nnx.state(_build(config, key)))


@functools.lru_cache
def _abstract_params(config, mesh):
    """`mesh` is the one that is set, and decides the shardings."""
    return jax.eval_shape(lambda key: _parameters(config, key), _abstract_key())


@functools.lru_cache
def _graphdef(config):
    return nnx.graphdef(nnx.eval_shape(lambda key: _build(config, key), _abstract_key()))


def _abstract_key():
    return jax.eval_shape(lambda: jax.random.key(0))
