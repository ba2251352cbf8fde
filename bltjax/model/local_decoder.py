"""Patches back to bytes: cross-attention before windowed blocks, then logits (model.md#decoder)."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from bltjax.config import BLTConfig
from bltjax.model.block_rows import block_of_rows_and_blocks, in_rows, sources, start_rows
from bltjax.model.cross_attention import add_residual, make_cross_layers, wide_to_vectors
from bltjax.model.parameters import Embedding, Linear, RMSNorm
from bltjax.model.transformer import block_of_rows, layer_slice, make_blocks, scan_layers
from bltjax.ops.pooling import take_patches
from bltjax.ops.slots import read_slots

MASK = "mask_embedding"  # of bytes that blocks do not know, by their distance from a known one


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
        if config.diffusion_block:
            # At 0 an unknown byte begins as the prediction of the byte after the last known one.
            self.mask_embedding = Embedding(config.diffusion_block, local.dim, std=0.0, key=key_out)

    def __call__(self, h, patch_states, patches, segments, blocks=None, embedded=None):
        """Maps h [B, L, E], patch_states [B, P, G] -> logits, states of all layers [N, B, L, E].

        Logits are float32 [B, L, V]. A byte reads `patches.decoder_ids`, the last patch complete
        once the byte is known. With Blocks of N bytes in all, whose ids are `embedded` [B, N, E],
        both results are pairs: of the bytes, as without them, and of those of the blocks.
        """
        config, local, reading = self.config, self.config.local_decoder, self.config.cross_attention
        chex.assert_shape(h, (*segments.shape, local.dim))
        chex.assert_shape(patch_states, (*patches.lengths.shape, config.global_transformer.dim))
        if config.has_decoder_projection:
            patch_states = self.patch_embedding_projection(patch_states)
        if config.skip_projection:
            h = self.skip_projection(h)
        run_block, ids = block_of_rows(local, segments, config), patches.decoder_ids
        if blocks is not None:
            run_block = block_of_rows_and_blocks(config, segments, blocks)
            at, distances = map(in_rows, sources(blocks.starts, blocks.ids))
            rows = read_slots(h, at), embedded, in_rows(blocks.ids), distances
            rows = start_rows(*rows, self.mask_embedding.weight[...])
            h, ids = (h, rows), (ids, in_rows(blocks.patch_ids, blocks.ids.shape[-1]))

        if not reading.decoder:

            def add_patch(h, ids):
                return h + take_patches(patch_states, ids) * (ids >= 0)[..., None].astype(h.dtype)

            h = jax.tree.map(add_patch, h, ids)
            h, states = scan_layers(self.layers, h, run_block, config.remat)
            return self.logits(h), states

        patch_states = wide_to_vectors(patch_states, reading.k)

        def both(layer, h):
            block, cross = layer
            read = cross.bytes_from_patches(h, patch_states, ids, reading.k, reading.window_decoder)
            add = functools.partial(add_residual, doubled=reading.doubled_residual)
            return run_block(block, jax.tree.map(add, h, read))

        num_cross = local.num_layers if reading.all_layers_decoder else 1
        h, states = scan_layers(
            (layer_slice(self.layers, 0, num_cross), self.cross_attn_layers), h, both, config.remat
        )
        if num_cross < local.num_layers:
            h, more = scan_layers(
                layer_slice(self.layers, num_cross, None), h, run_block, config.remat
            )
            states = jax.tree.map(lambda *parts: jnp.concatenate(parts), states, more)
        return self.logits(h), states

    def logits(self, h):
        """Maps h [B, L, E], or several as a pytree -> float32 logits [B, L, V]."""
        return jax.tree.map(lambda h: self.output(self.norm(h)).astype(jnp.float32), h)
