"""Patch buffers: published ids, overflow, and the same numbers on every mesh."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bltjax.config import PatchingConfig
from bltjax.patching import boundaries, buffers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden_data" / "golden"
THRESHOLD = 1.335442066192627
MODELS = ["meta_A_1b_like", "meta_B_7b_like", "meta_C_windows_alllayers"]
L, NUM_PATCHES = 12, 6
ROWS = st.lists(st.lists(st.booleans(), min_size=L, max_size=L), min_size=3, max_size=3)

from_starts = jax.jit(buffers.buffers_from_starts, static_argnums=1)
from_lengths = jax.jit(buffers.buffers_from_lengths, static_argnums=1)


def as_starts(rows):
    return np.array([[True, *row] for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_published_ids(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    lengths = golden["patch_lengths"]
    num_bytes = golden["tokens"].shape[1]
    entropies = jnp.asarray(golden["entropies"])
    config = PatchingConfig(threshold=THRESHOLD)
    starts = boundaries.patch_starts(config, jnp.zeros_like(entropies, jnp.int32), entropies)
    by_lengths = from_lengths(lengths, num_bytes)
    by_starts = from_starts(starts, lengths.shape[1])
    for result in (by_lengths, by_starts):
        np.testing.assert_array_equal(result.lengths, lengths)
        np.testing.assert_array_equal(result.encoder_ids, golden["patch_ids_enc"])
        np.testing.assert_array_equal(result.decoder_ids, golden["patch_ids_dec"])
        np.testing.assert_array_equal(result.overflow, 0)
    np.testing.assert_array_equal(by_lengths.starts, by_starts.starts)
    assert (np.asarray(by_lengths.starts)[lengths == 0] == num_bytes + 1).all()


def test_a_row_written_out():
    result = from_lengths(np.array([[1, 3, 2, 0]]), 5)
    assert result.encoder_ids.tolist() == [[0, 1, 1, 1, 2]]
    assert result.decoder_ids.tolist() == [[0, 0, 0, 1, 1]]
    assert result.starts.tolist() == [[0, 1, 4, 6]]
    assert result.mask.tolist() == [[True, True, True, False]]
    undivided = from_lengths(np.array([[6, 0, 0, 0]]), 5)
    assert undivided.encoder_ids.tolist() == [[0] * 5]
    assert undivided.decoder_ids.tolist() == [[-1] * 5]


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_overflow_loses_no_byte(rows):
    """The columns hold the first patches, and the last one everything that is left."""
    starts = as_starts(rows)
    result = from_starts(starts, NUM_PATCHES)
    for b, row in enumerate(starts):
        lengths = boundaries.lengths_from_starts(row)
        merged = max(len(lengths) - NUM_PATCHES, 0)
        kept = np.zeros(NUM_PATCHES, int)
        kept[: len(lengths)] = lengths[:NUM_PATCHES]
        kept[-1] += lengths[NUM_PATCHES:].sum()
        assert result.lengths[b].tolist() == kept.tolist()
        assert int(result.lengths[b].sum()) == L + 1
        assert int(result.overflow[b]) == merged
        ids = np.repeat(np.arange(NUM_PATCHES), kept)
        assert result.encoder_ids[b].tolist() == ids[:-1].tolist()
        assert result.decoder_ids[b].tolist() == (ids[1:] - 1).tolist()
        assert result.starts[b].tolist() == (np.cumsum(kept) - kept).tolist()
        assert result.mask[b].tolist() == (kept > 0).tolist()


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_lengths_and_starts_agree(rows):
    by_starts = from_starts(as_starts(rows), L + 1)
    by_lengths = from_lengths(by_starts.lengths, L)
    for name, value in by_starts._asdict().items():
        expected_dtype = jnp.bool_ if name == "mask" else jnp.int32
        assert value.dtype == getattr(by_lengths, name).dtype == expected_dtype
        np.testing.assert_array_equal(getattr(by_lengths, name), value, name)


def test_position_0_starts_a_patch_in_any_case():
    starts = np.array([[False, False, True, False]])
    np.testing.assert_array_equal(from_starts(starts, 3).lengths, [[2, 2, 0]])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 1)])
def test_the_batch_stays_sharded(shape):
    """Boundaries and buffers of a sharded batch, whole step inside jit, need no collective."""
    if jax.device_count() < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} devices, {jax.device_count()} here")
    rng = np.random.default_rng(0)
    entropies = rng.uniform(0, 3, (8, L)).astype(np.float32)
    tokens = rng.integers(0, 260, (8, L)).astype(np.int32)
    configs = [
        PatchingConfig(name, threshold=1.0, threshold_add=0.1, patch_size=3, max_patch_length=5)
        for name in boundaries.RULES
    ]

    def step(tokens, entropies):
        starts = [boundaries.patch_starts(config, tokens, entropies) for config in configs]
        packed = [buffers.buffers_from_starts(row, NUM_PATCHES) for row in starts]
        return packed, [buffers.buffers_from_lengths(each.lengths, L) for each in packed]

    expected = jax.jit(step)(tokens, entropies)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=jax.devices()[: np.prod(shape)])
    rows = NamedSharding(mesh, P(("data", "fsdp"), None))
    with jax.set_mesh(mesh):
        inputs = jax.device_put((tokens, entropies), rows)
        compiled = jax.jit(step).lower(*inputs).compile()
        result = compiled(*inputs)
    for value, correct in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert value.sharding.spec[0] == ("data", "fsdp")
        np.testing.assert_array_equal(value, correct)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
