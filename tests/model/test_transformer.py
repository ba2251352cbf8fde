"""Blocks as TPUs compute them, with their kernels interpreted, beside those of CPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.config import EntropyModelConfig, TransformerConfig
from bltjax.model import functional, transformer
from bltjax.model.transformer import each_layer
from bltjax.ops import attention, platform
from bltjax.ops.attention import Choice
from bltjax.ops.kernels.splash_attention import splash_attention

L, STACK = 150, TransformerConfig(dim=48, num_heads=3, num_kv_heads=1, window=70)


@pytest.mark.parametrize("device", ["cpu", "tpu"])
def test_turned_queries_are_scaled_for_splash_kernels(device, monkeypatch):
    """A width of 16 and 48 show a scale that is missing or there twice."""
    model = EntropyModelConfig(STACK)
    rng = np.random.default_rng(0)
    x, cotangent = jnp.asarray(rng.normal(size=(2, 2, L, STACK.dim)), jnp.float32)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, L)), axis=1), jnp.int32)
    params = functional.init(model, jax.random.key(0))
    block = each_layer(functional._model(model, params).layers)[0]

    def run(block, x):
        out = transformer.block_of_rows(STACK, segments, model)(block, x)
        return jnp.sum(out * cotangent), out

    run = jax.value_and_grad(run, (0, 1), has_aux=True)
    expected = run(block, x)
    monkeypatch.setattr(platform, "platform", lambda: device)
    monkeypatch.setattr(transformer, "attention_kernel", lambda *_: Choice("splash", "as set"))
    interpreted = functools.partial(splash_attention, interpret=True)
    monkeypatch.setattr(attention, "splash_attention", interpreted)
    for one, other in zip(*map(jax.tree.leaves, (expected, run(block, x))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())
