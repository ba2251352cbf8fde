"""Slots read and written at other places in each row, against loops over rows."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.ops import slots as ops
from bltjax.ops.slots import on_rows, read_positions, write_positions

SHAPES = [(3, 5, 2), (2, 2, 6, 3), (1, 1, 1, 4)]  # [B, ..., R, D]
read_slots, write_slots = jax.jit(ops.read_slots), jax.jit(ops.write_slots)


@given(st.sampled_from(SHAPES), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_reading_clips(shape, num_read, seed):
    rng = np.random.default_rng(seed)
    cache, slots = rng.normal(size=shape), rng.integers(-3, shape[-2] + 3, (shape[0], num_read))
    found = read_slots(jnp.float32(cache), jnp.int32(slots))
    expected = [
        row[..., np.clip(at, 0, shape[-2] - 1), :] for row, at in zip(cache, slots, strict=True)
    ]
    np.testing.assert_array_equal(found, np.float32(expected))


@given(st.sampled_from(SHAPES), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_writing_drops_what_is_outside(shape, num_new, seed):
    rng = np.random.default_rng(seed)
    cache, new = rng.normal(size=shape), rng.normal(size=(*shape[:-2], num_new, shape[-1]))
    slots = np.stack([rng.permutation(shape[-2] + 3)[:num_new] for _ in range(shape[0])])
    found = write_slots(jnp.float32(cache), jnp.float32(new), jnp.int32(slots))
    for row, new_row, at in zip(cache, new, slots, strict=True):
        inside = at < shape[-2]
        row[..., at[inside], :] = new_row[..., inside, :]
    np.testing.assert_array_equal(found, np.float32(cache))


def test_the_cache_keeps_its_dtype():
    cache = jnp.zeros((1, 3, 2), jnp.bfloat16)
    with warnings.catch_warnings(action="error"):  # as of a scatter of another dtype
        written = write_slots(cache, jnp.ones((1, 1, 2), jnp.float32), jnp.int32([[1]]))
    assert written.dtype == jnp.bfloat16
    np.testing.assert_array_equal(written[0, :, 0].astype(np.float32), [0, 1, 0])


def test_positions():
    values = jnp.int32([[10, 11, 12], [20, 21, 22]])
    positions = jnp.int32([[-1, 2], [3, 0]])
    np.testing.assert_array_equal(read_positions(values, positions), [[10, 12], [22, 20]])
    written = write_positions(values, jnp.int32([[7, 8], [7, 8]]), jnp.int32([[0, 2], [3, 1]]))
    np.testing.assert_array_equal(written, [[7, 11, 8], [20, 8, 22]])


@pytest.mark.parametrize("axes", [("batch", "heads", None, None), ("batch", None, None, None)])
def test_a_mesh_changes_nothing(axes, use_mesh):
    """Rows on their devices, and heads where there are any; the result lies as the cache does."""
    rng = np.random.default_rng(0)
    cache, new = rng.normal(size=(4, 2, 5, 3)), rng.normal(size=(4, 2, 2, 3))
    slots = rng.permuted(np.tile(np.arange(7), (4, 1)), axis=1)[:, :2]
    written = write_slots(*map(jnp.asarray, (cache, new, slots)))
    expected = [np.asarray(x) for x in (written, read_slots(written, jnp.asarray(slots)))]
    with use_mesh(1, 2, 2):
        spec = sharding.spec(*axes)
        placed = [
            jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))
            for x in (cache, new)
        ]
        slots = sharding.put_batch(slots)
        written = write_slots(*placed, slots)
        read = read_slots(written, slots)
        assert jax.typeof(written).sharding.spec == jax.typeof(read).sharding.spec == spec
        for found, alone in zip((written, read), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


def test_functions_of_rows(use_mesh):
    with use_mesh(2, 2, 1):
        x = sharding.put_batch(np.arange(8))
        sums = on_rows(lambda x, shift: x + shift["by"] + x.sum(), x, dict(by=10))
        assert jax.typeof(sums).sharding.spec == sharding.batch_spec(1)
        # Each device sees its two rows only.
        np.testing.assert_array_equal(sums, np.arange(8) + 10 + np.repeat([1, 5, 9, 13], 2))


@given(st.sampled_from(SHAPES), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_some_rows_are_as_all_of_them(shape, num, seed):
    rng = np.random.default_rng(seed)
    rows = rng.permutation(shape[0])[: max(1, shape[0] - 1)].astype(np.int32)
    cache, new = rng.normal(size=shape), rng.normal(size=(*shape[:-2], num, shape[-1]))
    slots = np.stack([rng.permutation(shape[-2] + 3)[:num] for _ in range(shape[0])])
    cache, new, slots = jnp.float32(cache), np.float32(new), np.int32(slots)
    np.testing.assert_array_equal(
        read_slots(cache, slots[rows], rows), np.array(read_slots(cache, slots))[rows]
    )
    others = np.setdiff1d(np.arange(shape[0]), rows)
    elsewhere = slots.copy()
    elsewhere[others] = shape[-2]  # dropped
    np.testing.assert_array_equal(
        write_slots(cache, new[rows], slots[rows], rows), write_slots(cache, new, elsewhere)
    )
