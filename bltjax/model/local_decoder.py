"""Patches back to bytes: cross-attention before windowed blocks, then logits (model.md#decoder)."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from bltjax.config import BLTConfig
from bltjax.model.cross_attention import add_residual, make_cross_layers, wide_to_vectors
from bltjax.model.parameters import Linear, RMSNorm
from bltjax.model.transformer import block_of_rows, layer_slice, make_blocks, scan_layers
from bltjax.ops.pooling import take_patches


class LocalDecoder(nnx.Module):
    def __init__(self, config: BLTConfig, key):
        self.config = config
        local, cross = config.local_decoder, config.cross_attention
        dim = config.global_transformer.dim
        key_patch, key_blocks, key_cross, key_out = jax.random.split(key, 4)
        if config.has_decoder_projection:
            self.patch_embedding_projection = Linear(
                config.read_width, dim, std=dim**-0.5, axes=(None, "embed"), key=key_patch
            )
        if config.skip_projection:
            self.skip_projection = Linear(
                local.dim, local.dim, std=0.0, axes=(None, "embed"), key=key_out
            )
        # base_std reaches the global stack only (model.md#initial-weights).
        init = dataclasses.replace(config.init, base_std=None)
        self.layers = make_blocks(local, init, key_blocks)
        if cross.decoder:
            self.cross_attn_layers = make_cross_layers(
                local, cross.decoder_heads, init, cross.all_layers_decoder, key_cross
            )
        self.norm = RMSNorm(local.dim, local.norm_eps)
        self.output = Linear(
            config.vocab_size, local.dim, std=local.dim**-0.5, axes=(None, "embed"), key=key_out
        )

    def __call__(self, h, patch_states, patches, segments):
        """Maps h [B, L, E], patch_states [B, P, G] -> logits, states of all layers [N, B, L, E].

        Logits are float32 [B, L, V]. A byte reads `patches.decoder_ids`, the last patch complete
        once the byte is known.
        """
        config, local = self.config, self.config.local_decoder
        chex.assert_shape(h, (*segments.shape, local.dim))
        chex.assert_shape(patch_states, (*patches.lengths.shape, config.global_transformer.dim))
        if config.has_decoder_projection:
            patch_states = self.patch_embedding_projection(patch_states)
        if config.skip_projection:
            h = self.skip_projection(h)
        run_block = block_of_rows(local, segments, config)

        if not config.cross_attention.decoder:
            ids = patches.decoder_ids
            h = h + take_patches(patch_states, ids) * (ids >= 0)[..., None].astype(h.dtype)
            h, states = scan_layers(self.layers, h, run_block, config.remat)
            return self.logits(h), states

        k = config.cross_attention.k
        patch_states = wide_to_vectors(patch_states, k)

        def both(layer, h):
            block, cross = layer
            read = cross.bytes_from_patches(
                h, patch_states, patches.decoder_ids, k, config.cross_attention.window_decoder
            )
            return run_block(block, add_residual(h, read, config.cross_attention.doubled_residual))

        num_cross = local.num_layers if config.cross_attention.all_layers_decoder else 1
        h, states = scan_layers(
            (layer_slice(self.layers, 0, num_cross), self.cross_attn_layers), h, both, config.remat
        )
        if num_cross < local.num_layers:
            h, more = scan_layers(
                layer_slice(self.layers, num_cross, None), h, run_block, config.remat
            )
            states = jnp.concatenate([states, more])
        return self.logits(h), states

    def logits(self, h):
        """Maps h [B, L, E] -> float32 logits [B, L, V]."""
        return self.output(self.norm(h)).astype(jnp.float32)
