"""The large transformer that runs once per patch (model.md#global-transformer)."""

import chex
import jax
from flax import nnx

from bltjax.config import BLTConfig
from bltjax.model.parameters import Linear
from bltjax.model.transformer import make_blocks, run_blocks


class GlobalTransformer(nnx.Module):
    """Blocks over patches, after a projection where widths differ, without a final norm."""

    def __init__(self, config: BLTConfig, key):
        self.config = config
        key_blocks, key_in = jax.random.split(key)
        stack, width = config.global_transformer, config.patch_width
        if width != stack.dim:
            self.token_embedding_projection = Linear(
                stack.dim, width, std=width**-0.5, axes=(None, "embed"), key=key_in
            )
        self.layers = make_blocks(stack, config.init, key_blocks)

    def __call__(self, x, segments):
        """Maps x [B, P, patch_width], segments int32 [B, P] -> [B, P, G]."""
        chex.assert_shape(x, (*segments.shape, self.config.patch_width))
        return self.run(self.widen(x), segments)

    def run(self, x, segments):
        """Maps what the first block reads, x [B, N, G], segments int32 [B, N] -> [B, N, G]."""
        return run_blocks(self.layers, self.config.global_transformer, x, segments, self.config)

    def widen(self, x):
        """Maps x [B, P, patch_width] -> [B, P, G], what the first block reads."""
        if self.config.patch_width != self.config.global_transformer.dim:
            return self.token_embedding_projection(x)
        return x
