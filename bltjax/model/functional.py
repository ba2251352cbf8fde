"""The waist: models as pure functions of a config and a nested dict of arrays.

Nothing outside `bltjax/model/` knows which module system holds the parameters.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig
from bltjax.model.blt import BLT
from bltjax.model.entropy_model import EntropyModel


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
    params = jax.tree.map(jnp.asarray, params)  # weights may come as NumPy arrays
    return nnx.merge(_graphdef(config), params)(tokens, *inputs, **known)


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
