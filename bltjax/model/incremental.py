"""The models a few positions at a time, on caches, equal to a full pass (model.md#generation).

`read_tokens` and `read_bytes` take positions as they come, `close_patches` runs the global stack on
patches that are complete, and `predict` gives the logits of positions whose patches are closed.
All writes are by position: to read a position again changes nothing, and a row steps back by
reading earlier positions again. Parameters are prepared or not, see `model/prepared.py`.

Letters: B rows, T new positions, M new patches, K vectors per patch, E local width. `first` int32
[B] is the position of each row's first new one, and `count` [B] says how many of the T are meant.
"""

import functools

import jax
import jax.numpy as jnp

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig
from bltjax.config.model import HASH_TABLES
from bltjax.model.block_rows import sources, start_rows
from bltjax.model.cache import BLTCache, Stack
from bltjax.model.cross_attention import (
    add_residual,
    merge_vectors,
    split_vectors,
    vectors_to_wide,
    wide_to_vectors,
)
from bltjax.model.embeddings import embed_ids
from bltjax.model.hash_tables import lookup_sum
from bltjax.model.local_decoder import MASK
from bltjax.model.prepared import (
    cross_keys_values,
    cross_read,
    norm,
    prepare,
    project,
    run_block,
)
from bltjax.model.transformer import rotary_of
from bltjax.ops import platform
from bltjax.ops.cached_attention import (
    block_ring_attention,
    ring_attention,
    slots_attention,
    span_attention,
    store_attention,
    write_cache,
)
from bltjax.ops.slots import below, on_shards, read_slots, span, take_rows, write_slots


def _prepared(function):
    """Prepares the parameters that function(config, params, ...) is given."""

    @functools.wraps(function)
    def with_prepared(config, params: dict, *inputs):
        return function(config, prepare(config, params), *inputs)

    return with_prepared


@_prepared
def read_tokens(
    config: EntropyModelConfig,
    params,
    cache: Stack,
    tokens,
    first,
    count,
    line_starts=0,
    before=None,
):
    """Returns states [B, T, E] of the last layer after tokens int32 [B, T], and the new cache.

    line_starts int32 [B, T]: the first position that each may see, with a window. before: int32
    [B, n]: the `ngram_reach` ids before the tokens, 0 where there are none.
    """
    stack = config.transformer
    tables = _tables(config, params)
    x = embed_ids(tokens, _embedding(params["tok_embeddings"]), tables, config, before=before)

    def attend(q, k, v, kept):
        if stack.window is None:
            return store_attention(q, k, v, kept, first, count)
        return _ring_attention(stack, first, count, tokens.shape[1], line_starts)(q, k, v, kept)

    return _run_blocks(params["layers"], stack, x, cache, first, attend)


@_prepared
def token_logits(config: EntropyModelConfig, params, states):
    """Returns logits float32 [B, T, V] from states [B, T, E] of `read_tokens`."""
    return _logits(params, config.transformer, states)


@_prepared
def read_bytes(
    config: BLTConfig, params, cache: BLTCache, tokens, before, first, count, opens
) -> BLTCache:
    """Runs the encoder on tokens int32 [B, T], and returns the cache with its results.

    before: int32 [B, n]: the `ngram_reach` ids before them, 0 where there are none. opens:
    bool [B, T]: a patch starts here.
    """
    encoder, local, cross = params["local_encoder"], config.local_encoder, config.cross_attention
    tables = _tables(config, params)
    h = embed_ids(tokens, _embedding(encoder["tok_embeddings"]), tables, config, before=before)
    states = []
    attend = _ring_attention(local, first, count, tokens.shape[1])
    h, rings = _run_blocks(encoder["layers"], local, h, cache.encoder, first, attend, states=states)
    positions = span(first, 0, tokens.shape[1])
    byte, pooled = cache.byte, h
    if cross.encoder:
        read = states if cross.all_layers_encoder else [h]
        pooled = read[0]
        slots = _slots(positions, count, byte[0][0].shape[2])
        byte = tuple(
            _write(kept, cross_keys_values(layer, h, local.norm_eps), slots)
            for kept, layer, h in zip(byte, encoder["cross_attn_layers"], read, strict=True)
        )
    num_slots = cache.states.shape[1]
    last = read_slots(cache.pooled, (first[:, None] - 1) % num_slots)
    pooled = _pool_on(config.pooling, last, pooled.astype(jnp.float32), opens)
    slots = _slots(positions, count, num_slots)
    return cache._replace(
        encoder=rings,
        byte=byte,
        states=write_slots(cache.states, h, slots),
        pooled=write_slots(cache.pooled, pooled, slots),
    )


def ngram_reach(config) -> int:
    """Returns the number of ids before a position that its longest n-gram holds."""
    return max(config.hash.sizes, default=1) - 1


@_prepared
def close_patches(
    config: BLTConfig, params, cache: BLTCache, starts, ends, seen_from, count, rows=None
) -> BLTCache:
    """Runs the global stack on the next `count` int32 [B] patches, and returns the new cache.

    starts, ends: int32 [B, M], their positions, the end not included. seen_from: the first position
    that a patch reads, with the encoder's window of patches. rows: those of the cache that B stands
    for, see `ops/slots.py`; None: all.
    """
    stack, first = params["global_transformer"], take_rows(cache.num_patches, rows)
    valid = below(count, starts.shape[1])
    starts, ends, seen_from = (jnp.where(valid, x, 0) for x in (starts, ends, seen_from))
    patches = _encode_patches(config, params["local_encoder"], cache, starts, ends, seen_from, rows)
    if config.patch_width != config.global_transformer.dim:
        patches = project(patches, stack["token_embedding_projection"])

    def attend(q, k, v, kept):
        return store_attention(q, k, v, kept, first, count, rows=rows)

    patches, stores = _run_blocks(
        stack["layers"], config.global_transformer, patches, cache.patch, first, attend
    )
    cache = cache._replace(patch=stores, num_patches=_add_count(cache.num_patches, count, rows))
    numbers = span(first, 0, starts.shape[1])
    decoder = params["local_decoder"]
    return _add_decoder_patches(config, decoder, cache, patches, numbers, valid, rows)


@_prepared
def predict_block(config: BLTConfig, params, cache: BLTCache, ids, starts, patch_numbers):
    """Returns logits float32 [B, T, V] of the bytes of a block, at each place of the byte there.

    ids: int32 [B, T], MASK_ID where a byte is to be found. starts: int32 [B], the position of the
    first. patch_numbers: int32 [B], the last patch that is complete before it. Bytes that are known
    up to the first unknown one have been read. See `model/block_rows.py`; the cache stays as it is.
    """
    decoder, local = params["local_decoder"], config.local_decoder
    embedded = _embedding(params["local_encoder"]["tok_embeddings"])(
        jnp.maximum(ids, 0), jnp.dtype(config.compute_dtype)
    )
    at, distances = sources(starts, ids)
    h = read_slots(cache.states, at % cache.states.shape[1])
    if config.skip_projection:
        h = project(h, decoder["skip_projection"])
    h = start_rows(h, embedded, ids, distances, decoder[MASK]["weight"])

    def attend(q, k, v, kept):
        return block_ring_attention(q, k, v, kept, starts, local.window), kept

    numbers = jnp.broadcast_to(patch_numbers[:, None], ids.shape)
    read = _reader(config, decoder, cache, numbers)
    h, _ = _run_blocks(decoder["layers"], local, h, cache.decoder, starts, attend, before=read)
    return _logits(decoder, local, h)


@_prepared
def predict(config: BLTConfig, params, cache: BLTCache, num_new: int, first, count, patch_numbers):
    """Returns logits float32 [B, T, V] of T = num_new positions that were read, and the cache.

    patch_numbers: int32 [B, T]: the closed patch that each position reads.
    """
    decoder, local = params["local_decoder"], config.local_decoder
    positions = span(first, 0, num_new)
    h = read_slots(cache.states, positions % cache.states.shape[1])
    if config.skip_projection:
        h = project(h, decoder["skip_projection"])
    attend = _ring_attention(local, first, count, num_new)
    read = _reader(config, decoder, cache, patch_numbers)
    h, rings = _run_blocks(decoder["layers"], local, h, cache.decoder, first, attend, before=read)
    return _logits(decoder, local, h), cache._replace(decoder=rings)


def _reader(config: BLTConfig, decoder, cache: BLTCache, patch_numbers):
    """Returns read(index, h): h [B, T, E] with what it reads of patches before a layer.

    patch_numbers: int32 [B, T], the last patch that each position reads.
    """
    local, cross = config.local_decoder, config.cross_attention
    if cross.decoder:
        slots, visible = _patch_slots(cache.read[0][0].shape[2], cross, patch_numbers)
        layers = decoder["cross_attn_layers"]

        def read(index, h):
            if index >= len(layers):
                return h

            def attend(q):
                return slots_attention(q, cache.read[index], slots, visible)

            read = cross_read(layers[index], h, local.norm_eps, attend)
            return add_residual(h, read, cross.doubled_residual)
    else:
        patches = read_slots(cache.patch_states, patch_numbers % cache.patch_states.shape[1])

        def read(index, h):
            return h if index else h + patches

    return read


def _tables(config, params):
    """Returns the lookup of the hash tables of a model, see `HashTables`; None without any."""
    if not config.hash.sizes:
        return None
    look_up = functools.partial(lookup_sum, params[HASH_TABLES]["weight"])
    if "hash_projection" not in params:
        return look_up
    return lambda ids, dtype: project(look_up(ids, dtype), params["hash_projection"])


def _embedding(params):
    """Returns the lookup of an embedding, see `Embedding`."""
    return lambda ids, dtype: sharding.lookup(params["weight"], ids).astype(dtype)


def _logits(params, stack, states):
    """Maps states [B, T, E] -> float32 logits [B, T, V]."""
    normed = norm(states, params["norm"]["weight"], stack.norm_eps)
    return project(normed, params["output"]).astype(jnp.float32)


def _run_blocks(layers, stack, x, cache, first, attend, before=None, states=None):
    """Returns x [B, T, E] after the blocks of a stack, and the stack's cache.

    attend(q, k, v, kept): the result and the cache of a layer with the new keys and values.
    before(index, x) runs before each block; what each block yields is added to `states`.
    """
    factors = rotary_of(stack, span(first, 0, x.shape[1]))
    if platform.platform() != "cpu":  # else computed in each layer
        factors = jax.lax.optimization_barrier(factors)
    kept = []

    def attend_and_keep(q, k, v):
        out, keys_values = attend(q, k, v, cache[len(kept)])
        kept.append(keys_values)
        return out

    for index, block in enumerate(layers):
        x = before(index, x) if before else x
        x = run_block(block, stack, x, factors, attend_and_keep)
        if states is not None:
            states.append(x)
    return x, tuple(kept)


def _ring_attention(stack, first, count, num_new, earliest=0):
    """Returns attention over the window of a stack, from the positions `earliest` on."""
    earliest = jnp.maximum(earliest, span(first, 0, num_new) - stack.window + 1)

    def attend(q, k, v, kept):
        return ring_attention(q, k, v, kept, first, count, earliest)

    return attend


def _slots(positions, count, num_slots):
    """Returns cache slots of the first `count` positions, or of a single one; others: past all."""
    meant = positions < positions[:, :1] + count[:, None]
    return jnp.where(meant | (positions.shape[1] == 1), positions % num_slots, num_slots)


def _write(kept, new, slots, rows=None):
    """Writes new keys and values [B, M, G, D] into cache slots [B, M] on each device."""
    more = () if rows is None else (rows,)

    def write(keys, values, slots, *rest):
        rows, kept = (rest[0], rest[1:]) if more else (None, rest)
        return write_cache(kept, keys, values, slots, rows)

    first = 3 + len(more)
    return on_shards(write, *new, slots, *more, *kept, like=tuple(range(first, first + len(kept))))


def _pool_on(mode, last, h, opens):
    """Pools the bytes of each position's patch so far; for "mean" the result is their sum.

    last [B, 1, E]: the result for the position before. h float32 [B, T, E].
    """
    operation = {"max": jnp.maximum, "min": jnp.minimum, "mean": jnp.add}[mode]

    def join(left, right):
        (left_opens, left), (right_opens, right) = left, right
        joined = jnp.where(right_opens, right, operation(left, right))
        return left_opens | right_opens, joined

    flags = jnp.pad(opens, ((0, 0), (1, 0)))[..., None]
    joined = jax.lax.associative_scan(join, (flags, jnp.concatenate([last, h], axis=1)), axis=1)
    return joined[1][:, 1:]


def _add_count(num_patches, count, rows):
    if rows is None:
        return num_patches + count
    return on_shards(lambda x, new, at: x.at[at].add(new), num_patches, count, rows)


def _encode_patches(config, encoder, cache, starts, ends, seen_from, rows):
    """Returns patches [B, M, patch_width] as the encoder hands them to the global stack."""
    cross = config.cross_attention
    pooled = read_slots(cache.pooled, (ends - 1) % cache.pooled.shape[1], rows)
    if config.pooling == "mean":
        pooled = pooled / jnp.maximum(ends - starts, 1)[..., None]
    pooled = pooled.astype(config.compute_dtype)
    if not cross.encoder:
        return pooled

    def attend(q, kept):
        q = split_vectors(q, cross.k)
        return merge_vectors(span_attention(q, kept, seen_from, ends, rows=rows))

    patches = wide_to_vectors(project(pooled, encoder["patch_embedding_projection"]), cross.k)
    for layer, kept in zip(encoder["cross_attn_layers"], cache.byte, strict=True):
        eps = config.local_encoder.norm_eps
        read = cross_read(layer, patches, eps, functools.partial(attend, kept=kept))
        patches = add_residual(patches, read, cross.doubled_residual)
    return vectors_to_wide(patches, cross.k)


def _add_decoder_patches(
    config, decoder, cache: BLTCache, patches, numbers, valid, rows
) -> BLTCache:
    """Returns the cache with the decoder's keys and values of new global states [B, M, G]."""
    cross = config.cross_attention
    if config.has_decoder_projection:
        patches = project(patches, decoder["patch_embedding_projection"])
    if not cross.decoder:
        num_slots = cache.patch_states.shape[1]
        slots = jnp.where(valid, numbers % num_slots, num_slots)
        return cache._replace(patch_states=write_slots(cache.patch_states, patches, slots, rows))
    vectors = wide_to_vectors(patches, cross.k)
    num_slots = cache.read[0][0].shape[2]
    slots = span(numbers % (num_slots // cross.k) * cross.k, 0, cross.k)
    slots = jnp.where(valid[..., None], slots, num_slots).reshape(len(slots), -1)
    eps = config.local_decoder.norm_eps
    new = [
        _write(x, cross_keys_values(layer, vectors, eps), slots, rows)
        for x, layer in zip(cache.read, decoder["cross_attn_layers"], strict=True)
    ]
    return cache._replace(read=tuple(new))


def _patch_slots(num_slots, cross, patch_numbers):
    """Returns cache slots int32 [B, T, W * K] of the last W patches, and which hold anything."""
    seen = span(patch_numbers, 1 - (cross.window_decoder or 1), 1)
    slots = span(seen % (num_slots // cross.k) * cross.k, 0, cross.k)
    visible = jnp.broadcast_to((seen >= 0)[..., None], slots.shape)
    return (x.reshape(*patch_numbers.shape, -1) for x in (slots, visible))
