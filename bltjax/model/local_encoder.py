"""Bytes to patches: a few windowed blocks, pooling, and cross-attention (model.md#encoder)."""

import dataclasses

import chex
import jax
from flax import nnx

from bltjax.config import BLTConfig
from bltjax.model.cross_attention import (
    add_residual,
    make_cross_layers,
    vectors_to_wide,
    wide_to_vectors,
)
from bltjax.model.parameters import Embedding, Linear
from bltjax.model.transformer import (
    block_of_rows,
    each_layer,
    layer_slice,
    make_blocks,
    rematerialised,
    run_blocks,
    scan_layers,
)
from bltjax.ops.pooling import pool_patches


class LocalEncoder(nnx.Module):
    def __init__(self, config: BLTConfig, key):
        self.config = config
        local, cross = config.local_encoder, config.cross_attention
        key_embed, key_blocks, key_cross, key_patch = jax.random.split(key, 4)
        std = local.dim**-0.5
        self.tok_embeddings = Embedding(config.vocab_size, local.dim, std=std, key=key_embed)
        # base_std reaches the global stack only (model.md#initial-weights).
        init = dataclasses.replace(config.init, base_std=None)
        self.layers = make_blocks(local, init, key_blocks)
        if cross.encoder:
            self.cross_attn_layers = make_cross_layers(
                local, cross.encoder_heads, init, cross.all_layers_encoder, key_cross
            )
            self.patch_embedding_projection = Linear(
                cross.k * local.dim, local.dim, std=std, axes=(None, "embed"), key=key_patch
            )

    def __call__(self, embedded, patches, segments):
        """Maps embedded [B, L, E] -> byte states h [B, L, E] and patches [B, P, patch_width]."""
        local = self.config.local_encoder
        chex.assert_shape(embedded, (*segments.shape, local.dim))
        if not self.config.cross_attention.encoder:
            h = run_blocks(self.layers, local, embedded, segments, self.config)
            return h, self._pool(h, patches)
        if not self.config.cross_attention.all_layers_encoder:
            h = run_blocks(self.layers, local, embedded, segments, self.config)
            (cross,) = each_layer(self.cross_attn_layers)
            patch_states = self._read(cross, self._queries(h, patches), h, patches)
        else:
            h, patch_states = self._alternate(embedded, patches, segments)
        return h, vectors_to_wide(patch_states, self.config.cross_attention.k)

    def _alternate(self, h, patches, segments):
        """Runs cross-attention after every block; only the first one pools its queries."""
        local = self.config.local_encoder
        run_block = block_of_rows(local, segments, self.config)

        def both(layer, carry):
            (block, cross), (h, patch_states) = layer, carry
            h = run_block(block, h)
            if patch_states is None:
                patch_states = self._queries(h, patches)
            return h, self._read(cross, patch_states, h, patches)

        layers = (self.layers, self.cross_attn_layers)
        (first,) = each_layer(layer_slice(layers, 0, 1))
        carry = rematerialised(both, self.config.remat)(first, (h, None))
        if local.num_layers > 1:
            carry, _ = scan_layers(layer_slice(layers, 1, None), carry, both, self.config.remat)
        return carry

    def _pool(self, h, patches):
        return pool_patches(h, patches.encoder_ids, patches.lengths.shape[1], self.config.pooling)

    def _queries(self, h, patches):
        """Returns k vectors of each patch, from its pooled bytes: [B, P*k, E]."""
        wide = self.patch_embedding_projection(self._pool(h, patches))
        return wide_to_vectors(wide, self.config.cross_attention.k)

    def _read(self, cross, patch_states, h, patches):
        config = self.config.cross_attention
        read = cross.patches_from_bytes(
            patch_states, h, patches.encoder_ids, config.k, config.window_encoder
        )
        return add_residual(patch_states, read, config.doubled_residual)
