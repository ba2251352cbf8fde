"""The loss of blocks that the decoder fills in (BLT-D, 2026; model.md#blocks).

A block starts where a patch does. Some of its bytes are masked, and the decoder tells them from the
others, from the bytes before the block, and from the last patch that is complete there. That of a
masked byte counts 1 / t, where t is the probability with which it was masked: with "random" masks
their loss is a bound on the nats of the whole block (Sahoo et al., 2024).
"""

import math

import jax
import jax.numpy as jnp

from bltjax import sharding
from bltjax.config import BLTConfig, DiffusionConfig, TrainingConfig
from bltjax.model import functional
from bltjax.model.block_rows import Blocks, in_rows
from bltjax.ops.block_attention import num_tiles, tile_length
from bltjax.ops.cross_entropy import next_byte_nats
from bltjax.ops.slots import below, on_shards, read_positions, read_slots, span
from bltjax.patching.buffers import PatchBuffers
from bltjax.vocabulary import MASK_ID, PAD_ID

Array = jax.Array


def has_blocks(model_config, config: TrainingConfig) -> bool:
    """Tells whether a model learns to fill in blocks."""
    return bool(model_config.diffusion_block and config.diffusion.weight)


def blocks_of_row(model: BLTConfig, config: DiffusionConfig, row_bytes: int, row_patches: float):
    """Returns the tiles of a row, and the blocks of a tile; see `ops/block_attention.py`."""
    tiles = num_tiles(row_bytes, model.local_decoder.window)
    blocks = config.row_blocks or row_patches
    return tiles, min(max(math.ceil(blocks / tiles), 1), tile_length(row_bytes, tiles))


def logits_and_sums(
    model: BLTConfig,
    config: DiffusionConfig,
    params: dict,
    batch: dict,
    patches: PatchBuffers,
    **known,
) -> tuple[Array, dict]:
    """Returns logits float32 [B, L, V] of the next bytes, and sums over the batch, float32.

    The sums are `block_nats` over `block_targets` bytes, those of all blocks as far as the sample
    tells, and the number of `blocks` and of `blocks_taken`. The batch has `block_noise`, see
    `noise`. known: of `functional.intermediates`.
    """
    shape = blocks_of_row(model, config, batch["tokens"].shape[1], patches.lengths.shape[1])
    blocks, targets, weights, counts = draw_blocks(config, shape, batch, patches)
    inputs = batch["tokens"], patches, batch["document_ids"]
    found = functional.intermediates(model, params, *inputs, blocks=blocks, **known)
    nats = next_byte_nats(found["block_logits"], in_rows(targets))
    return found["logits"], counts | dict(block_nats=jnp.sum(nats * in_rows(weights)))


def noise(model: BLTConfig, seed: int, step: Array, tokens: Array) -> Array:
    """Draws the numbers from 0 to 1 that decide on the blocks of a step, float32 [B, L, 2 + K].

    They are of places, so that they are the same in however many parts a batch is computed, on any
    mesh: whether a block starts after it, the share of its bytes that is masked, and which.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    shape = *tokens.shape, 2 + model.diffusion_block
    return jax.random.uniform(key, shape, out_sharding=sharding.batch_spec(3))


def draw_blocks(
    config: DiffusionConfig, shape: tuple[int, int], batch: dict, patches: PatchBuffers
) -> tuple[Blocks, Array, Array, dict]:
    """Draws M blocks in each of S tiles of a row (shape), and masks some of their bytes.

    Returns the blocks, the ids int32 [B, S, M, K] that are there, the weights float32 [B, S, M, K]
    of their nats, and counts. The mean of a weighted sum over all noise is the sum over all blocks
    of nats that are to be found: blocks that are drawn stand for the others of their tile.
    """
    (rows, length), block = batch["tokens"].shape, batch["block_noise"].shape[2] - 2
    everywhere = sharding.shard_rows(
        jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    )
    _, _, learned = bytes_after(batch, everywhere, block)
    learned &= ~below(jnp.full_like(everywhere, first_masked(config)), block)
    opens = (patches.encoder_ids == patches.decoder_ids) & jnp.any(learned, axis=-1)
    before, stands_for = choose(opens, batch["block_noise"][..., 0], *shape)
    ids, is_there, targets = bytes_after(batch, before, block)
    drawn = read_slots(batch["block_noise"], in_rows(before)).reshape(*before.shape, 2 + block)
    share = drawn[..., 1:2] if config.t_per == "block" else batch["block_noise"][:, :1, None, 1:2]
    masked, probability = draw_masks(config, share, drawn[..., 2:])
    blocks = Blocks(
        starts=before + 1,
        ids=jnp.where(masked | ~is_there, MASK_ID, ids),
        patch_ids=read_positions(patches.decoder_ids, in_rows(before)).reshape(before.shape),
    )
    counts = dict(
        block_targets=jnp.sum(learned & opens[..., None], dtype=jnp.float32),
        blocks=jnp.sum(opens, dtype=jnp.float32),
        blocks_taken=jnp.sum(stands_for > 0, dtype=jnp.float32),
    )
    return blocks, ids, stands_for[..., None] * (masked & targets) / probability, counts


def draw_masks(config: DiffusionConfig, share: Array, noise: Array) -> tuple[Array, Array]:
    """Returns which bytes of blocks are masked, bool [..., K], and with what probability.

    share: float32 [..., 1], noise: float32 [..., K], from 0 to 1.
    """
    if config.masks == "random":
        share = config.t_min + (1 - config.t_min) * share
        return noise < share, share
    last = noise.shape[-1] - 1
    offsets = span(jnp.zeros_like(noise[..., 0]), 0, last + 1)
    known = 1 + jnp.floor(share * last)
    return offsets >= known, jnp.maximum(offsets, 1) / last


def first_masked(config: DiffusionConfig) -> int:
    """Returns the first byte of a block that may be masked.

    Decoding draws the one before "prefix" masks from its own distribution.
    """
    return 0 if config.masks == "random" else 1


def bytes_after(batch: dict, before: Array, block: int) -> tuple[Array, Array, Array]:
    """Returns the `block` ids after each of the positions `before` int32 [B, ...], [B, ..., K].

    Also whether they are there, in the row and in the document of that position, and whether they
    are to be learned too.
    """
    at = span(before, 1, block + 1)

    def read(name, positions):
        return read_positions(batch[name], in_rows(positions)).reshape(positions.shape)

    ids, documents = read("tokens", at), read("document_ids", at)
    own = read("document_ids", before)[..., None]
    is_there = (at < batch["tokens"].shape[1]) & (ids != PAD_ID) & (documents == own)
    return ids, is_there, is_there & read("loss_mask", at - 1)


def choose(is_open: Array, noise: Array, tiles: int, blocks: int) -> tuple[Array, Array]:
    """Chooses the open positions of each tile of rows bool [B, L] that have the largest noise.

    Returns positions int32 [B, S, M] in order, and how many open ones each stands for, float32
    [B, S, M]: 0 for a position that is not open, as there are where a tile has fewer than M.
    """

    def of_shard(is_open, noise):
        size = tile_length(is_open.shape[1], tiles)
        end = (0, 0), (0, tiles * size - is_open.shape[1])
        is_open, noise = (jnp.pad(x, end).reshape(len(x), tiles, size) for x in (is_open, noise))
        _, places = jax.lax.top_k(jnp.where(is_open, noise, noise - 1), blocks)
        places = jnp.sort(places, axis=-1)
        taken = jnp.take_along_axis(is_open, places, axis=-1)
        number, drawn = (x.sum(axis=-1, keepdims=True) for x in (is_open, taken))
        first = jnp.arange(tiles, dtype=jnp.int32)[None, :, None] * size
        positions = jnp.minimum(places + first, length - 1)
        return positions, jnp.where(taken, number / jnp.maximum(drawn, 1), 0.0)

    length = is_open.shape[1]
    return on_shards(of_shard, is_open, noise, like=(0, 0))


def weighted(config: DiffusionConfig, sums: dict) -> Array:
    """Returns what blocks add to the sum of nats.

    That is scaled so that a division by the number of targets leaves the weight times a mean.
    """
    per_byte = sums["targets"] / jnp.maximum(sums["block_targets"], 1)
    return config.weight * per_byte * sums["block_nats"]


def means(sums: dict) -> dict:
    """Returns metrics of the sums of `logits_and_sums`: nats of a byte, and the share of blocks."""
    return dict(
        block_loss=sums["block_nats"] / jnp.maximum(sums["block_targets"], 1),
        block_share=sums["blocks_taken"] / jnp.maximum(sums["blocks"], 1),
    )


def blocks_per_byte(model, config: TrainingConfig, row_bytes: float, row_patches: float) -> float:
    """Returns the blocks that a training step reads for each byte of its rows."""
    if not has_blocks(model, config):
        return 0.0
    return (
        math.prod(blocks_of_row(model, config.diffusion, int(row_bytes), row_patches)) / row_bytes
    )
