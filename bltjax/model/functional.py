"""Models as pure functions of a config and a nested dict of arrays.

No code outside `bltjax/model/` depends on the module system that holds the parameters.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig
from bltjax.model import incremental, prepared
from bltjax.model.blt import BLT
from bltjax.model.entropy_model import EntropyModel
from bltjax.model.local_decoder import MASK
from bltjax.model.lora import matrices, only_adapters, overlaid, set_dropout
from bltjax.patching.boundaries import entropy_segments
from bltjax.patching.entropy import next_byte_entropy


def init(config: BLTConfig | EntropyModelConfig, key: jax.Array) -> dict:
    """Draws initial parameters: nested dict of float32 arrays, sharded over the mesh.

    Paths are the published names, with layers stacked on a leading axis. The distributions are
    those of model.md#initial-weights.
    """
    return jax.jit(lambda key: _parameters(config, key))(key)


def added(config: BLTConfig, key: jax.Array) -> dict:
    """Draws initial values of what published models do not have: adapters, the mask of blocks."""

    def draw(key):
        params = _parameters(config, key)
        decoder = params["local_decoder"]
        mask = {name: x for name, x in decoder.items() if name == MASK}
        return overlaid(only_adapters(params), dict(local_decoder=mask))

    return jax.jit(draw)(key)


def abstract_params(config: BLTConfig | EntropyModelConfig) -> dict:
    """Returns shapes, dtypes and shardings of `init`'s result, without computing anything."""
    return _abstract_params(config, jax.sharding.get_abstract_mesh())


def apply(
    config: BLTConfig | EntropyModelConfig, params: dict, tokens: jax.Array, *inputs, **known
):
    """Returns next-byte logits float32 [B, L, V] of tokens int32 [B, L].

    For a BLTConfig `inputs` are the PatchBuffers and, optionally, document ids [B, L]; for an
    EntropyModelConfig, optionally, segment ids [B, L]. Without ids a document ends at its EOS.
    known: `ngrams` of the model's `__call__`, whose hash tables are then not read; `dropout_key` of
    `intermediates`.
    """
    return intermediates(config, params, tokens, *inputs, **known)["logits"]


def intermediates(config, params, tokens, *inputs, dropout_key=None, **known) -> dict:
    """Returns everything that a forward pass computes, by name; see `BLT.__call__`.

    dropout_key: draws which inputs of adapters are left out; None: none are. known: `ngrams`, and
    `blocks` of a model with a `diffusion_block`, in the order and number that a caller likes.
    """
    tokens, inputs, known = sharding.shard_rows((tokens, inputs, known))
    model = _model(config, params)
    if dropout_key is not None:
        set_dropout(model, dropout_key)
    return model(tokens, *inputs, **known)


def matrix_names(config: BLTConfig) -> list[str]:
    """Returns the names of the matrices that may have adapters."""
    return [name for name, _ in matrices(nnx.eval_shape(lambda: _build(config, jax.random.key(0))))]


def without_global_blocks(config: BLTConfig, params: dict, patch_states) -> jax.Array:
    """Returns what the global transformer would make of patch_states if it had no blocks.

    Maps [B, P, patch_width] -> [B, P, G]: where widths differ the projection is left.
    """
    return _model(config, params).global_transformer.widen(patch_states)


def encode(config: BLTConfig, params: dict, tokens, patches, document_ids, **known):
    """Returns byte states [B, L, E], and patches [B, P, G] as the first global block reads them.

    The arguments are those of `BLT.__call__`.
    """
    model = _model(config, params)
    _, byte_states, patch_states = model.encode(tokens, patches, document_ids, **known)
    return byte_states, model.global_transformer.widen(patch_states)


def global_states(config: BLTConfig, params: dict, inputs, segments):
    """Returns what the global blocks make of inputs [B, N, G] in their segments int32 [B, N]."""
    return _model(config, params).global_transformer.run(inputs, segments)


def decode(config: BLTConfig, params: dict, byte_states, global_states, patches, document_ids):
    """Returns the logits float32 [B, L, V] of the local decoder alone.

    byte_states, global_states: as in `intermediates`, or others in their place.
    """
    decoder = _model(config, params).local_decoder
    return decoder(byte_states, global_states, patches, document_ids)[0]


def entropies(config: EntropyModelConfig, params: dict, tokens, reset_at_newlines, document_ids=0):
    """Returns entropies float32 [B, L], nats, of the byte after each of tokens int32 [B, L].

    The model sees the document of a byte, or its line where `reset_at_newlines`. document_ids:
    int32 [B, L], for rows where a document may be cut and has no EOS to end it (model.md#entropy).
    """
    tokens = sharding.shard_rows(tokens)
    segments = entropy_segments(tokens, reset_at_newlines) + document_ids
    return next_byte_entropy(apply(config, params, tokens, segments))


prepare = prepared.prepare
read_tokens, token_logits = incremental.read_tokens, incremental.token_logits
read_bytes, close_patches = incremental.read_bytes, incremental.close_patches
predict_block = incremental.predict_block
predict = incremental.predict


def _model(config, params):
    """Returns the module of a config with these parameters; NumPy arrays will do."""
    return nnx.merge(_graphdef(config), jax.tree.map(jnp.asarray, params))


def _build(config, key):
    return (BLT if isinstance(config, BLTConfig) else EntropyModel)(config, key)


def _parameters(config, key):
    return nnx.to_pure_dict(nnx.state(_build(config, key)))


@functools.lru_cache
def _abstract_params(config, mesh):
    """Caches by mesh too: the mesh that is set decides the shardings."""
    return jax.eval_shape(lambda key: _parameters(config, key), _abstract_key())


@functools.lru_cache
def _graphdef(config):
    return nnx.graphdef(nnx.eval_shape(lambda key: _build(config, key), _abstract_key()))


def _abstract_key():
    return jax.eval_shape(lambda: jax.random.key(0))
