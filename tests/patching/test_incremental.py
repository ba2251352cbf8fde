"""Patch starts noted as bytes come, against the rules on whole texts."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.config import PatchingConfig
from bltjax.patching import incremental
from bltjax.patching.boundaries import (
    RULES,
    needs_entropies,
    newline_segments,
    patch_starts,
    row_threshold,
)

ROWS, SIZE = 3, 18
CONFIGS = {name: PatchingConfig(name, threshold=1.0, threshold_add=0.25) for name in RULES} | {
    "entropy, at most 3": PatchingConfig(threshold=1.5, max_patch_length=3),
    "entropy in bfloat16": PatchingConfig(threshold=1.335442066192627, bf16_compat=True),
    "monotonic, at most 2": PatchingConfig("monotonic", threshold=0.5, max_patch_length=2),
    "published global_monotonic": PatchingConfig(
        "global_monotonic", threshold=0.5, published_skip_at_3=True
    ),
    "space, at most 2": PatchingConfig("space", max_patch_length=2),
    "static 1": PatchingConfig("static", patch_size=1),
    "bpe, at most 4": PatchingConfig("bpe", max_patch_length=4),
    "falling in bfloat16": PatchingConfig("falling", threshold=4.006, bf16_compat=True),
    "falling, at most 4": PatchingConfig("falling", threshold=5.0, max_patch_length=4),
}
# Few values, so that some equal a threshold and each other, in bfloat16 if not in float32.
ENTROPIES = [0.0, 0.5, 1.0, 1.3345, 1.3354, 1.337, 1.3301, 1.5, 1.75, 2.25]
CHARACTERS = [[1], [3], [3]] + [[b + 4] for b in b"  \n\nazAZ09@.\x7f\x80\xbf\xc0\xff"]
CHARACTERS += [[b + 4 for b in c.encode()] for c in "\u00e9\u043c\u5b57\U0001f600\U0001f600"] * 2
# Steps of the rows: how far each goes back to another continuation, and how far it then reads.
STEPS = st.lists(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=ROWS, max_size=ROWS),
    min_size=4,
    max_size=12,
)


def draw_tokens(rng, size):
    """Tokens of random characters, the last of which may be cut."""
    drawn = [CHARACTERS[i] for i in rng.integers(0, len(CHARACTERS), size)]
    return np.array([*itertools.chain.from_iterable(drawn)][:size], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def note_starts(config, thresholds, *inputs):
    """thresholds: float32 [B] in the place of the config's; None: that one."""
    if thresholds is not None:
        config = dataclasses.replace(config, threshold=thresholds[:, None])
    return incremental.note_starts(config, *inputs)


@functools.partial(jax.jit, static_argnums=3)
def note_lines(*inputs):
    return incremental.note_lines(*inputs)


@pytest.mark.parametrize("num_new", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
@given(steps=STEPS, seed=st.integers(0, 2**32 - 1), of_rows=st.booleans())
@settings(max_examples=8)
def test_starts(name, num_new, steps, seed, of_rows):
    config, thresholds = CONFIGS[name], None
    if of_rows and needs_entropies(config):
        thresholds = np.full(ROWS, row_threshold(config, config.threshold), np.float32)
    rng = np.random.default_rng(seed)
    tokens = np.stack([draw_tokens(rng, SIZE) for _ in range(ROWS)])
    entropies = np.zeros((ROWS, SIZE), np.float32)
    record, length = incremental.new_record(jnp.asarray(tokens)), np.zeros(ROWS, int)
    for moves in [*steps, *[[(0, 4)] * ROWS] * (SIZE // num_new + 1)]:
        back, count = np.array(moves).T
        first = np.maximum(length - back, 0)
        count = np.minimum(np.minimum(count, num_new), SIZE - first)
        again = rng.random(ROWS) < 0.3  # the same once more
        new = rng.choice(ENTROPIES, (ROWS, num_new)).astype(np.float32)
        for row, (at, n) in enumerate(zip(first, count, strict=True)):
            if again[row]:
                known = entropies[row, at : length[row]][:n]
                new[row, : len(known)] = known
            elif rng.random() < 0.3:  # nothing that comes later matters
                tokens[row, at:] = draw_tokens(rng, SIZE - at)
            entropies[row, at : at + n] = new[row, :n]
            length[row] = at + n if n or not again[row] else length[row]
        record = record._replace(tokens=jnp.asarray(tokens))
        record = note_starts(config, thresholds, record, np.int32(first), np.int32(count), new)
        check(config, record, tokens, entropies, length)
    assert (length == SIZE).all()


def check(config, record, tokens, entropies, length):
    starts = patch_starts(config, tokens, entropies)
    record = jax.tree.map(np.asarray, record)
    np.testing.assert_array_equal(record.start_positions[:, 0], 0)
    for row, known in enumerate(length):
        expected = np.cumsum(starts[row])[1:]
        np.testing.assert_array_equal(record.num_starts[row, :known], expected[:known])
        positions = np.flatnonzero(starts[row, : known + 1])
        np.testing.assert_array_equal(record.start_positions[row, : len(positions)], positions)
        np.testing.assert_array_equal(record.entropies[row, :known], entropies[row, :known])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=8),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_lines(moves, seed):
    """A context starts where its line does, however the line was read."""
    rng = np.random.default_rng(seed)
    tokens = draw_tokens(rng, SIZE)[None]
    segments = newline_segments(tokens)[0]
    expected = np.searchsorted(segments, segments)
    record, length = incremental.new_record(jnp.asarray(tokens)), 0
    for back, count in [*moves, *[(0, 4)] * 5]:
        first = max(length - back, 0)
        count = min(count, SIZE - first)
        record = note_lines(record, np.int32([first]), np.int32([count]), 4)
        length = max(length, first + count)
        found = np.asarray(record.line_starts)[0]
        np.testing.assert_array_equal(found[:length], expected[:length])
    assert length == SIZE
