"""Every attention against a softmax under a dense mask, and proof that no dense mask is made."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax import sharding
from bltjax.ops.attention import self_attention
from bltjax.ops.cross_attention import bytes_from_patches_attention, patches_from_bytes_attention
from bltjax.ops.kernels import tiled_attention as tiles
from bltjax.ops.kernels.splash_attention import scaled, splash_attention
from bltjax.ops.kernels.tiled_attention import tiled_attention
from tests.ops.reference import assert_all_close, dense_attention, normal, with_gradients

SEEDS = 4
# Cross-attention: letters as in ops/cross_attention.py.
B, L, P, K, H, D = 2, 21, 7, 2, 3, 4


@pytest.mark.parametrize(
    "length, window, heads, kv_heads",
    [
        (9, None, 4, 2),  # the global stack: everything before
        (9, 16, 2, 2),  # window longer than the row
        (16, 16, 2, 1),
        (17, 16, 2, 2),
        (23, 5, 4, 2),  # not a multiple, grouped queries
        (12, 4, 3, 3),
        (7, 1, 2, 2),  # each byte sees itself only
    ],
)
def test_self_attention(length, window, heads, kv_heads):
    """model.md#masks: s is seen from t iff t - window < s <= t and both are in one document."""
    run = with_gradients(functools.partial(self_attention, window=window))
    t, s = np.arange(length)[:, None], np.arange(length)[None, :]
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        q, cotangent = normal(rng, B, length, heads, D, scale=3), normal(rng, B, length, heads, D)
        k, v = normal(rng, 2, B, length, kv_heads, D)
        segments = np.sort(rng.integers(-1, seed + 1, (B, length)), axis=1).astype(np.int32)
        near = (s <= t) & (s > t - (window or length))
        mask = near & (segments[:, :, None] == segments[:, None, :])
        assert_all_close(
            run(q, k, v, segments, cotangent), dense_attention(q, k, v, mask, cotangent)
        )


@pytest.mark.parametrize(
    "window, batch, heads, kv_heads",
    [(None, 1, 2, 1), (None, 5, 4, 4), (1, 1, 2, 1), (17, 1, 2, 1), (40, 5, 4, 2), (200, 1, 2, 2)],
)
def test_tiles(window, batch, heads, kv_heads):
    """Several tiles of queries and of keys, a few or many of them at a time (model.md#masks)."""
    run = with_gradients(functools.partial(tiled_attention, window=window, tile=16))
    t, s = np.arange(77)[:, None], np.arange(77)[None, :]
    rng = np.random.default_rng(heads)
    q, cotangent = normal(rng, batch, 77, heads, D, scale=9), normal(rng, batch, 77, heads, D)
    k, v = normal(rng, 2, batch, 77, kv_heads, D)
    segments = np.sort(rng.integers(-1, 4, (batch, 77)), axis=1).astype(np.int32)
    mask = (s <= t) & (s > t - (window or 77)) & (segments[:, :, None] == segments[:, None, :])
    assert_all_close(run(q, k, v, segments, cotangent), dense_attention(q, k, v, mask, cotangent))


@pytest.mark.parametrize("window", [None, 20, 64, 512])
def test_rounds_are_those_that_run(window, monkeypatch):
    """`Plan.rounds` counts what the loop of the forward pass does."""
    ran, visible_of = [], tiles._visible

    def counting(tiling, index, *rest):
        jax.debug.callback(lambda _: ran.append(1), index)
        return visible_of(tiling, index, *rest)

    monkeypatch.setattr(tiles, "_visible", counting)
    q, k, v = jnp.ones((3, 1, 500, 4, 8))
    tiles.tiled_attention(q, k, v, jnp.zeros((1, 500), jnp.int32), window)
    jax.effects_barrier()
    tiling = tiles.choose_tiling(1, 500, 4, window)
    assert tiling.rounds == len(ran)
    visible = sum(min(i + 1, window or 500) for i in range(500))
    assert visible <= tiling.rounds * tiling.pairs_of_a_round < 4 * visible


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_no_tile_of_scores_is_turned(kv_heads):
    """Forward and backward products read scores as they lie: XLA would copy them, slowly."""

    def loss(q, k, v):
        return tiled_attention(q, k, v, jnp.zeros((2, 320), jnp.int32), 96, 48).sum()

    q, k = jnp.ones((2, 320, 4, 16)), jnp.ones((2, 320, kv_heads, 16))
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile().as_text()
    assert re.search(r"f32\[[\d,]*48(,[12])?,48\]", program)
    assert not re.search(r"f32\[[\d,]*48(,[12])?,48(,[12])?\]\S* transpose\(", program)


@pytest.mark.parametrize("window", [None, 33])
def test_tiles_add_up_in_float32(window):
    """Of bfloat16 inputs; a sum in bfloat16 would be off by several times as much."""
    run = with_gradients(functools.partial(tiled_attention, window=window, tile=16))
    rng = np.random.default_rng(3)
    shape = 2, 300, 2, 32
    q, k, v, cotangent = (jnp.asarray(normal(rng, *shape), jnp.bfloat16) for _ in range(4))
    t, s = np.arange(300)[:, None], np.arange(300)[None, :]
    mask = np.broadcast_to((s <= t) & (s > t - (window or 300)), (2, 300, 300))
    results = run(q, k, v, np.zeros((2, 300), np.int32), cotangent)
    for x, value in zip(results, dense_attention(q, k, v, mask, cotangent), strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.abs(np.asarray(x, np.float64) - value).max() < 5e-3 * np.abs(value).max()


@pytest.mark.long
@pytest.mark.parametrize(
    "window, heads, kv_heads, block", [(None, 4, 2, None), (130, 2, 2, None), (130, 2, 2, 256)]
)
def test_splash_kernels(window, heads, kv_heads, block, use_mesh):
    """The TPU's kernels, interpreted, over rows that fill no block (model.md#masks)."""

    def attention(q, k, v, segments):
        return splash_attention(scaled(q), k, v, segments, window, interpret=True, block=block)

    rng = np.random.default_rng(0)
    shape = 8, 150, heads, 32
    q, cotangent = normal(rng, *shape), normal(rng, *shape)
    k, v = normal(rng, 2, 8, 150, kv_heads, 32)
    segments = np.sort(rng.integers(-1, 2, (8, 150)), axis=1).astype(np.int32)
    t, s = np.arange(150)[:, None], np.arange(150)[None, :]
    mask = (s <= t) & (s > t - (window or 150)) & (segments[:, :, None] == segments[:, None, :])
    with use_mesh(2, 2, 2):
        heads_split = sharding.spec("batch", None, "heads", None)
        placed = [jax.reshard(x, heads_split) for x in (q, k, v, cotangent)]
        placed.insert(3, sharding.shard_rows(segments))
        assert_all_close(
            with_gradients(attention)(*placed), dense_attention(q, k, v, mask, cotangent)
        )


def random_ids(rng, first):
    """Sorted patch ids [B, L] from `first` on, some patches skipped, not always the last used."""
    return np.sort(rng.integers(first, rng.integers(1, P + 1), (B, L)), axis=1).astype(np.int32)


WINDOWS = [None, 1, 2, 3, 100]


@pytest.mark.parametrize("window", WINDOWS)
def test_patches_from_bytes(window):
    """model.md#cross-attention: query (j, r) sees byte t iff ids(t) <= j < ids(t) + window."""
    run = with_gradients(functools.partial(patches_from_bytes_attention, window=window))
    num_blind = 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        # Large scores: a byte that a patch does not see must not overflow the patch's softmax.
        q, cotangent = normal(rng, B, P, K, H, D, scale=3 + 20 * seed), normal(rng, B, P, K, H, D)
        k, v = normal(rng, 2, B, L, H, D)
        ids = random_ids(rng, 0)
        j, i = np.repeat(np.arange(P), K)[None, :, None], ids[:, None, :]
        mask = (i <= j) & (j < i + (window or 1))
        flat = (B, P * K, H, D)
        results = run(q, k, v, ids, cotangent)
        assert_all_close(
            results, dense_attention(q.reshape(flat), k, v, mask, cotangent.reshape(flat))
        )
        blind = ~mask.any(-1)
        num_blind += blind.sum()
        assert (np.asarray(results[0]).reshape(flat)[blind] == 0).all()
    assert num_blind or window == 100


@pytest.mark.parametrize("window", WINDOWS)
def test_bytes_from_patches(window):
    """model.md#cross-attention: byte t sees vector (j, r) iff 0 <= j <= ids(t) < j + window."""
    run = with_gradients(functools.partial(bytes_from_patches_attention, window=window))
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        q, cotangent = normal(rng, B, L, H, D, scale=3 + 20 * seed), normal(rng, B, L, H, D)
        k, v = normal(rng, 2, B, P, K, H, D)
        ids = random_ids(rng, -1)
        ids[:, :2] = -1
        j, i = np.repeat(np.arange(P), K)[None, None, :], ids[:, :, None]
        mask = (j <= i) & (i < j + (window or 1))
        flat = (B, P * K, H, D)
        results = run(q, k, v, ids, cotangent)
        assert_all_close(
            results, dense_attention(q, k.reshape(flat), v.reshape(flat), mask, cotangent)
        )
        assert (np.asarray(results[0])[ids < 0] == 0).all()


def sizes(jaxpr):
    """Elements of every intermediate of a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def largest(kind, length):
    """Largest intermediate of the forward and backward pass at `length` bytes, length/4 patches."""

    def f32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    of_bytes, of_patches = f32(1, length, 1, 2), f32(1, length // 4, 2, 1, 2)
    attention, q, kv = {
        "self": (functools.partial(self_attention, window=8), of_bytes, of_bytes),
        "encoder": (patches_from_bytes_attention, of_patches, of_bytes),
        "encoder, windowed": (
            functools.partial(patches_from_bytes_attention, window=3),
            of_patches,
            of_bytes,
        ),
        "decoder": (bytes_from_patches_attention, of_bytes, of_patches),
        "decoder, windowed": (
            functools.partial(bytes_from_patches_attention, window=3),
            of_bytes,
            of_patches,
        ),
        "causal": (self_attention, of_bytes, of_bytes),
        "dense": (lambda q, k, v, ids: jax.nn.dot_product_attention(q, k, v), of_bytes, of_bytes),
    }[kind]
    traced = jax.make_jaxpr(with_gradients(attention))(q, kv, kv, ids, q)
    return max(sizes(traced.jaxpr))


@pytest.mark.parametrize(
    "kind", ["self", "causal", "encoder", "encoder, windowed", "decoder", "decoder, windowed"]
)
def test_memory_is_linear_in_bytes(kind):
    """No [L, L] or [P*K, L] array: twice the bytes need at most twice the largest array."""
    short, long = largest(kind, 4096), largest(kind, 8192)
    assert long <= 2 * short
    assert long < 8192 * 8192 // 4 // 16  # far from L * P, let alone L * P * K


def test_the_measure_sees_a_dense_mask():
    assert largest("dense", 256) >= 256 * 256
