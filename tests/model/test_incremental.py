"""Models that read a few positions at a time, against the full pass over the whole text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax import sharding
from bltjax.config import CrossAttentionConfig, HashConfig, PatchingConfig
from bltjax.inference.decoders import BLTDecoder, for_generation
from bltjax.model import functional
from bltjax.model.cache import CacheSize
from bltjax.patching.buffers import buffers_from_starts
from tests import golden
from tests.inference.reference import row_patch_starts

pytestmark = pytest.mark.long  # one interpreter will do

B, C = 4, 40  # rows, positions; windows are of 8
BACK = 3  # positions that rows step back over, at most
NEWLINE = 14
A, B7, WINDOWS, NO_CROSS = golden.MODELS
ENTROPY = PatchingConfig(threshold=float(golden.arrays("meta_entropy")["threshold"]))
ENTROPY_CONFIG = golden.entropy_config()


def changed(name, **settings):
    """A golden config with other settings, and no more layers than it takes."""
    config = golden.blt_config(name)
    shallow = dataclasses.replace(config.global_transformer, num_layers=1)
    decoder = dataclasses.replace(config.local_decoder, num_layers=2)
    return dataclasses.replace(
        config, global_transformer=shallow, local_decoder=decoder, **settings
    )


def as_a_token_model(name):
    """A golden config with what byteified models may have, in all stacks."""
    config = changed(name)
    stacks = ("local_encoder", "global_transformer", "local_decoder")
    options = dict(qkv_bias=True, qk_norm=True, rope_factor=4.0, rope_original_positions=30)
    with_options = {n: dataclasses.replace(getattr(config, n), **options) for n in stacks}
    return dataclasses.replace(config, **with_options)


GROUPED = CrossAttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    num_heads_decoder=2,
    num_kv_heads_decoder=1,
    all_layers_encoder=True,
    window_encoder=3,
    window_decoder=2,
    doubled_residual=False,
)
ONLY_ENCODER = CrossAttentionConfig(decoder=False, num_heads=2, window_encoder=2)
ONLY_DECODER = CrossAttentionConfig(encoder=False, num_heads=2, all_layers_decoder=False)
CONFIGS = {
    "mean pooling, grouped heads, windows": changed(
        WINDOWS, pooling="mean", cross_attention=GROUPED
    ),
    "min pooling, one way": changed(
        B7, pooling="min", cross_attention=ONLY_ENCODER, hash=HashConfig((), 97)
    ),
    "a skip projection": changed(A, skip_projection=True),
    "biases, norms of heads, scaled positions": as_a_token_model(A),
    "mean pooling, the other way": changed(A, pooling="mean", cross_attention=ONLY_DECODER),
}
LINES = dataclasses.replace(ENTROPY, reset_at_newlines=True)
CASES = [  # config, rule, positions of a piece, device that parameters are laid out for, or None
    (A, ENTROPY, 1, None),
    (A, ENTROPY, 1, "gpu"),
    ("mean pooling, grouped heads, windows", LINES, 7, "cpu"),
    ("mean pooling, grouped heads, windows", LINES, 16, "gpu"),
    (WINDOWS, LINES, 16, None),
    (NO_CROSS, dataclasses.replace(ENTROPY, max_patch_length=3), 7, "cpu"),
    ("mean pooling, the other way", PatchingConfig(rule="static"), 16, "cpu"),
    ("a skip projection", PatchingConfig(rule="static"), 16, "cpu"),
    ("biases, norms of heads, scaled positions", PatchingConfig(rule="static"), 7, "cpu"),
    ("biases, norms of heads, scaled positions", PatchingConfig(rule="static"), 1, "gpu"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (B7, ENTROPY, 7, None),
            ("min pooling, one way", PatchingConfig(rule="space"), 1, None),
        )
    ),
]


@functools.cache
def models(name):
    """Config and parameters; random ones where there are no golden ones."""
    entropy = golden.params("meta_entropy")
    if name in golden.MODELS:
        return golden.blt_config(name), dict(blt=golden.params(name), entropy_model=entropy)
    config, rng = CONFIGS[name], np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), functional.abstract_params(config)
    )
    return config, dict(blt=params, entropy_model=entropy)


@functools.cache
def text():
    rng = np.random.default_rng(1)
    tokens = rng.integers(4, 260, (B, C)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.08] = NEWLINE
    tokens[:, 0] = 1
    return tokens


def full_pass(decoder, params):
    """Logits, entropies (or None) and patch starts."""

    @jax.jit
    def run(params, tokens):
        starts, entropies = row_patch_starts(
            decoder.patching, decoder.entropy_model, params["entropy_model"], tokens
        )
        patches = buffers_from_starts(starts, C + 1)
        return functional.apply(decoder.blt, params["blt"], tokens, patches), entropies, starts

    return jax.tree.map(np.asarray, run(params, sharding.put_batch(text())))


def random_pieces(num_new):
    """Tokens [N, B, C], first and count [N, B] of N steps, and which of these are of the text.

    A row now and then reads up to BACK positions again, and others ahead that are not of the text.
    """
    rng = np.random.default_rng(2)
    length, reached = np.zeros(B, np.int32), np.zeros(B, np.int32)
    steps = []
    while (length < C).any():
        tokens = text().copy()
        first = np.maximum(np.where(rng.random(B) < 0.3, reached - BACK, length), 0)
        first = np.minimum(first, length)
        astray = (rng.random(B) < 0.3) & (first > 0) & (first < C)
        count = rng.integers(1 if num_new == 1 else num_new // 2, num_new + 1, B)
        count = np.minimum(np.where(astray, np.minimum(count, BACK), count), C - first)
        if num_new == 1:  # a single position is always read
            first, count = np.minimum(first, C - 1), np.ones_like(count)
        for row in np.flatnonzero(astray):
            tokens[row, first[row] :] = rng.integers(4, 260, C - first[row])
        steps.append((tokens, np.int32(first), np.int32(count), ~astray))
        reached = np.maximum(reached, first + count)
        length = np.where(astray, first, first + count)
    return [np.stack(x) for x in zip(*steps, strict=True)]


def in_pieces(decoder, params, num_new):
    """Logits, and the state at the end."""
    size = CacheSize(rows=B, positions=C, patches=C, chunk=max(num_new, BACK + 1), max_rewind=BACK)

    def step(params, state, piece):
        tokens, first, count = piece
        last = first + count - 1
        state = state.with_tokens(tokens)
        back = decoder.rewind(state, jnp.maximum(first - 1, 0)).blt.num_patches
        back = jnp.where(first > 0, back, 0)
        state = state._replace(blt=state.blt._replace(num_patches=back))
        state = decoder.read(params, state, first, count, num_new)
        state = jax.lax.while_loop(
            lambda state: (decoder.num_waiting(state, last) > 0).any(),
            lambda state: decoder.close(params, state, last, 2),
            state,
        )
        logits, state = decoder.predict(params, state, first, count, num_new)
        return state, logits

    @jax.jit
    def run(params, *pieces):
        thresholds = jnp.full(B, decoder.threshold_of(None), jnp.float32)
        state = decoder.new_state(size, pieces[0][0], thresholds)
        return jax.lax.scan(functools.partial(step, params), state, pieces)

    *pieces, of_text = random_pieces(num_new)
    state, logits = jax.tree.map(np.asarray, run(params, *pieces))
    found, times = np.zeros((B, C, logits.shape[-1]), np.float32), np.zeros((B, C), int)
    _, firsts, counts = pieces
    for n, row in zip(*np.nonzero(of_text), strict=True):
        at = slice(firsts[n, row], firsts[n, row] + counts[n, row])
        new = logits[n, row, : counts[n, row]]
        known = times[row, at] > 0
        np.testing.assert_allclose(new[known], found[row, at][known], rtol=0, atol=2e-5)
        found[row, at], times[row, at] = new, times[row, at] + 1
    assert times.min() > 0 and times.max() > 1
    return found, state


@pytest.mark.parametrize("name, patching, num_new, device", CASES)
def test_pieces_equal_the_full_pass(name, patching, num_new, device, formulated_for):
    config, params = models(name)
    decoder = BLTDecoder(config, ENTROPY_CONFIG, patching)
    expected, entropies, starts = full_pass(decoder, params)
    with formulated_for(device or "cpu"):
        if device:
            params = for_generation(decoder, params)
            layers = params["blt"]["local_decoder"]["layers"]
            assert isinstance(layers, tuple) and len(layers) == config.local_decoder.num_layers
        logits, state = in_pieces(decoder, params, num_new)
    assert len(state.blt.patch[0]) == (1 if device == "gpu" else 2)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    if entropies is not None:
        np.testing.assert_allclose(state.record.entropies, entropies, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(state.record.num_starts, starts.cumsum(axis=1)[:, 1:])
    # All patches went through the global stack but the one that the next byte is in.
    np.testing.assert_array_equal(state.blt.num_patches, starts.sum(axis=1) - 1)
    assert len(set(state.blt.num_patches)) > 1 or patching.rule == "static"
