"""Layers laid out for generation are the layers of the model (see also test_incremental)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax import sharding
from bltjax.config import BLTConfig, CrossAttentionConfig, EntropyModelConfig, TransformerConfig
from bltjax.config.model import HashConfig
from bltjax.inference import decoders, memory
from bltjax.inference.decoders import PlainDecoder, for_generation
from bltjax.model import functional, prepared
from bltjax.model.transformer import block_of_rows, each_layer
from bltjax.ops.attention import self_attention
from bltjax.ops.rotary import rotary_factors

LOCAL = TransformerConfig(
    dim=16, num_layers=3, num_heads=4, num_kv_heads=2, window=8, ffn_multiple_of=8
)
BLT = BLTConfig(
    local_encoder=LOCAL,
    global_transformer=dataclasses.replace(LOCAL, dim=32, num_layers=2, window=None),
    local_decoder=LOCAL,
    hash=HashConfig((3,), 11),
    cross_attention=CrossAttentionConfig(num_heads=4, num_kv_heads=2),
)
ENTROPY = EntropyModelConfig(LOCAL)
DEVICES = ["cpu", "gpu"]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_a_block_computes_the_same(device, rows, formulated_for):
    params = functional.init(ENTROPY, jax.random.key(0))
    model = functional._model(ENTROPY, params)
    x = np.random.default_rng(0).normal(size=(rows, 7, LOCAL.dim)).astype(np.float32)
    segments = np.zeros((rows, 7), np.int32)
    block = each_layer(model.layers)[1]
    expected = block_of_rows(LOCAL, segments, ENTROPY)(block, x)
    with formulated_for(device):
        layers = prepared.prepare(ENTROPY, params)["layers"]
        factors = rotary_factors(jnp.arange(7)[None], LOCAL.head_width, LOCAL.rope_theta)
        found = prepared.run_block(
            layers[1],
            LOCAL,
            x,
            factors,
            lambda q, k, v: self_attention(q, k, v, segments, LOCAL.window),
        )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert np.abs(expected - x).max() > 0.1


@pytest.mark.parametrize("device", DEVICES)
def test_cross_attention_computes_the_same(device, formulated_for):
    params = functional.init(BLT, jax.random.key(0))
    model = functional._model(BLT, params)
    rng = np.random.default_rng(0)
    x, kv = rng.normal(size=(2, 1, 1, LOCAL.dim)).astype(np.float32)
    eps, seen = LOCAL.norm_eps, []

    def attend(q):
        seen.append(q)
        return q

    for name in ("local_encoder", "local_decoder"):
        layers = each_layer(getattr(model, name).cross_attn_layers)
        expected = layers[-1].read(x, attend), layers[-1].keys_values(kv)
        with formulated_for(device):
            layer = prepared.prepare(BLT, params)[name]["cross_attn_layers"][-1]
            read = prepared.cross_read(layer, x, eps, attend)
            found = read, prepared.cross_keys_values(layer, kv, eps)
        for one, other in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)
        np.testing.assert_allclose(*seen[-2:], rtol=0, atol=2e-6)


@pytest.mark.parametrize("config", [BLT, ENTROPY], ids=["blt", "entropy model"])
def test_matrices_are_in_the_compute_dtype_and_all_else_as_it_was(config):
    config = dataclasses.replace(config, compute_dtype="bfloat16")
    params = functional.init(config, jax.random.key(0))
    found = prepared.prepare(config, params)
    again = prepared.prepare(config, found)
    assert jax.tree.structure(again) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    part = found.get("local_decoder", found)
    dtypes = {x.dtype for x in jax.tree.leaves(part["layers"][0]) if x.ndim > 1}
    assert dtypes == {jnp.dtype("bfloat16")}
    assert part["layers"][0].ffn_norm.dtype == part["norm"]["weight"].dtype == jnp.float32


def test_matrices_are_whole_over_the_axis_that_training_splits(use_mesh, monkeypatch):
    decoder = PlainDecoder(ENTROPY, None)
    with use_mesh(1, 2, 2):
        params = functional.init(ENTROPY, jax.random.key(0))
        split = {sharding.spec("embed")[0]}
        whole = for_generation(decoder, params)
        assert not axes(whole["layers"]) & split
        assert axes(whole["layers"]) == {sharding.spec("heads")[0]}
        monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
        with pytest.warns(UserWarning, match="gathered for every byte.*choose a mesh"):
            kept = decoders.for_generation(decoder, params)
        assert axes(kept["layers"]) > split


def axes(layers) -> set:
    """Mesh axes that split any matrix."""
    named = [name for x in jax.tree.leaves(layers) for name in jax.typeof(x).sharding.spec]
    return set(named) - {None}
