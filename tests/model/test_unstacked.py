"""Layers on their own, with matrices transposed, are the same model (see also test_incremental)."""

import dataclasses

import jax
import numpy as np
import pytest

from bltjax.config import BLTConfig, EntropyModelConfig, HashConfig, TransformerConfig
from bltjax.model import functional
from bltjax.model.transformer import each_layer
from bltjax.model.unstacked import unstacked

LOCAL = TransformerConfig(dim=16, num_layers=3, num_heads=2, window=8, ffn_multiple_of=8)
BLT = BLTConfig(
    local_encoder=LOCAL,
    global_transformer=dataclasses.replace(LOCAL, dim=32, num_layers=2, window=None),
    local_decoder=LOCAL,
    hash=HashConfig((3,), 11),
)


@pytest.mark.parametrize("config", [BLT, EntropyModelConfig(LOCAL)], ids=["blt", "entropy model"])
def test_all_layers_come_back_bit_for_bit(config):
    params = functional.init(config, jax.random.key(0))
    apart = jax.jit(unstacked)(params)
    assert jax.tree.structure(apart) != jax.tree.structure(params)
    stacked, layers = functional._model(config, params), functional._model(config, apart)
    stacks = ["local_encoder", "global_transformer", "local_decoder"] if config is BLT else [None]
    for name in stacks:
        of_stacked, of_layers = (getattr(m, name) if name else m for m in (stacked, layers))
        assert len(of_layers.layers) == len(each_layer(of_stacked.layers)) > 1
        for kind in ("layers", "cross_attn_layers"):
            if hasattr(of_stacked, kind):
                compare(each_layer(getattr(of_stacked, kind)), list(getattr(of_layers, kind)))


def compare(expected, found):
    for one, other in zip(expected, found, strict=True):
        assert jax.tree.leaves(one)
        jax.tree.map(np.testing.assert_array_equal, one, other)
