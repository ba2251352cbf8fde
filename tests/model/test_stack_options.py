"""What stacks of byteified models may have: biases, norms of heads, scaled positions.

That they compute what the models do which have them is in test_llama; here is what else has to hold
of their parameters.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax import sharding
from bltjax.checkpoints import adapters, formats
from bltjax.checkpoints.lazy_arrays import insert
from bltjax.checkpoints.weights import Adapter, Weights, WeightsError, flat
from bltjax.config import (
    BLTConfig,
    EntropyModelConfig,
    OptimizerConfig,
    PatchingConfig,
    TransformerConfig,
)
from bltjax.config.lora import LoRAConfig
from bltjax.config.model import HashConfig
from bltjax.model import functional, lora, prepared
from bltjax.model.transformer import block_of_rows, each_layer
from bltjax.ops.attention import self_attention
from bltjax.ops.rotary import rotary_factors
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.training.optimizer import decays, part_of

LOCAL = TransformerConfig(
    dim=16, num_layers=2, num_heads=4, num_kv_heads=2, window=8, ffn_multiple_of=8
)
GLOBAL = dataclasses.replace(
    LOCAL, dim=32, window=None, qkv_bias=True, qk_norm=True, rope_factor=2.0
)
BLT = BLTConfig(
    local_encoder=LOCAL, global_transformer=GLOBAL, local_decoder=LOCAL, hash=HashConfig((3,), 11)
)

pytestmark = pytest.mark.long  # one interpreter will do
ENTROPY = EntropyModelConfig(dataclasses.replace(LOCAL, qkv_bias=True, qk_norm=True))
OPTIONS = dict(qkv_bias=False, qk_norm=False, rope_factor=1.0)


def random_params(config, seed=0):
    """All random, biases and norms too."""
    rng, abstract = np.random.default_rng(seed), functional.abstract_params(config)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), abstract)


def batch():
    tokens = np.random.default_rng(0).integers(4, 260, (8, 24)).astype(np.int32)
    lengths = np.tile(np.asarray([1, 4, 7, 3, 5, 5], np.int32), (8, 1))
    return tokens, lengths


def loss_and_gradients(config, params):
    tokens, lengths = batch()

    @jax.jit
    def run(params, tokens, lengths):
        def loss(params):
            patches = buffers_from_lengths(lengths, tokens.shape[1])
            logits = functional.apply(config, params, tokens, patches)
            return jnp.square(logits).mean()

        return jax.value_and_grad(loss)(params)

    return jax.tree.map(np.asarray, run(params, *sharding.put_batch((tokens, lengths))))


def test_parameters_exist_only_where_they_are_on():
    layer = {
        n: x.shape for n, x in flat(functional.abstract_params(BLT)).items() if ".attention." in n
    }
    extra = {n: s for n, s in layer.items() if not n.endswith((".weight",)) or "_norm" in n}
    there = "global_transformer.layers.attention"
    assert extra == {
        f"{there}.wq.bias": (2, 32),
        f"{there}.wk.bias": (2, 16),
        f"{there}.wv.bias": (2, 16),
        f"{there}.q_norm.weight": (2, 8),
        f"{there}.k_norm.weight": (2, 8),
    }
    params = functional.init(BLT, jax.random.key(0))["global_transformer"]["layers"]["attention"]
    assert not np.any(params["wq"]["bias"]) and np.all(np.asarray(params["q_norm"]["weight"]) == 1)


@pytest.mark.parametrize("option", OPTIONS)
def test_each_changes_what_is_computed(option):
    params = random_params(BLT)
    stack = dataclasses.replace(GLOBAL, **{option: OPTIONS[option]})
    config = dataclasses.replace(BLT, global_transformer=stack)
    fewer = {name: flat(params)[name] for name in flat(functional.abstract_params(config))}
    kept: dict = {}
    for name, x in fewer.items():
        insert(kept, name.split("."), x)
    tokens, lengths = batch()
    patches = buffers_from_lengths(jnp.asarray(lengths), tokens.shape[1])
    found = functional.apply(config, kept, tokens, patches)
    difference = found - functional.apply(BLT, params, tokens, patches)
    assert np.abs(difference).max() > 1e-3


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)])
def test_a_mesh_computes_the_same(sizes, use_mesh):
    params = random_params(BLT)
    expected = loss_and_gradients(BLT, params)
    with use_mesh(*sizes):
        abstract = functional.abstract_params(BLT)
        attention = abstract["global_transformer"]["layers"]["attention"]
        heads = sharding.spec("heads")[0]
        assert attention["wq"]["bias"].sharding.spec == jax.P(None, heads)
        placed = jax.tree.map(
            lambda x, like: jax.device_put(
                x, jax.NamedSharding(jax.sharding.get_mesh(), like.sharding.spec)
            ),
            params,
            abstract,
        )
        found = loss_and_gradients(BLT, placed)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_block_that_is_laid_out_computes_the_same(device, rows, formulated_for):
    params, stack = random_params(ENTROPY), ENTROPY.transformer
    x = np.random.default_rng(0).normal(size=(rows, 7, stack.dim)).astype(np.float32)
    segments = np.zeros((rows, 7), np.int32)
    block = each_layer(functional._model(ENTROPY, params).layers)[1]
    expected = block_of_rows(stack, segments, ENTROPY)(block, x)
    with formulated_for(device):
        layers = prepared.prepare(ENTROPY, params)["layers"]
        factors = rotary_factors(jnp.arange(7)[None], stack.head_width, stack.rope_theta)
        found = prepared.run_block(
            layers[1],
            stack,
            x,
            factors,
            lambda q, k, v: self_attention(q, k, v, segments, stack.window),
        )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_bfloat16_sums_the_gradient_of_a_bias_in_float32():
    """In bfloat16 the sum of 1,202 ones is 1,200 at best."""
    from bltjax.model.parameters import add_bias

    x, bias = jnp.zeros((2, 601, 4), jnp.bfloat16), jnp.zeros(4)
    gradient = jax.grad(lambda b: add_bias(x, b).astype(jnp.float32).sum())(bias)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, np.full(4, 1202.0))


def test_biases_are_of_their_part_and_decay_with_norms():
    name = "global_transformer.layers.attention.wq.bias"
    assert part_of(name) == "global"
    assert decays(OptimizerConfig(), name)
    assert not decays(OptimizerConfig(decay_norms=False), name)
    assert not decays(OptimizerConfig(decay_norms=False), name.replace("wq.bias", "q_norm.weight"))


def test_adapters_leave_biases():
    config = dataclasses.replace(BLT, lora=LoRAConfig(rank=2))
    params = random_params(config)
    plain, merged = lora.merged(config, params)
    tokens, lengths = batch()
    patches = buffers_from_lengths(jnp.asarray(lengths), tokens.shape[1])
    expected = functional.apply(config, params, tokens, patches)
    np.testing.assert_allclose(
        functional.apply(plain, merged, tokens, patches), expected, rtol=1e-4, atol=1e-4
    )
    base, own = adapters.separated(params)
    weights = Weights(plain, None, PatchingConfig(), dict(blt=base))
    lazily = adapters.merged(weights, Adapter(config.lora, own)).params["blt"]
    assert flat(lazily).keys() == flat(base).keys()


@pytest.mark.parametrize("format", ["hf", "meta"])
@pytest.mark.parametrize("option", OPTIONS)
def test_formats_that_cannot_say_it_refuse(format, option):
    stack = dataclasses.replace(GLOBAL, **{n: x for n, x in OPTIONS.items() if n != option})
    config = dataclasses.replace(BLT, global_transformer=stack)
    weights = Weights(
        config,
        ENTROPY,
        PatchingConfig(target_patch_bytes=None),
        dict(blt=random_params(config), entropy_model=random_params(ENTROPY)),
    )
    with pytest.raises(WeightsError) as error:
        formats.plan(weights, format)
    told = str(error.value)
    assert f"global_transformer.{option}=" in told and "transformer.qk_norm=True" in told
    assert not [n for n in OPTIONS if n != option and f"global_transformer.{n}=" in told]
