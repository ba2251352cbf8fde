"""Sums of rows that share an id: both forms against float64, on meshes, and their bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.ops.sorted_sums import TILE, scatter_sums, sorted_sums

FORMS = [scatter_sums, sorted_sums]
UNIT = 2.0**-24  # of rounding, in float32


def runs(seed, length, num_ids, stretch):
    """Returns ids that never decrease, from -1 to num_ids, in runs of about `stretch`, and rows."""
    rng = np.random.default_rng(seed)
    steps = rng.random((2, length)) < 1 / stretch
    ids = np.minimum(np.cumsum(steps * rng.integers(1, 3, (2, length)), axis=1) - 1, num_ids)
    return ids.astype(np.int32), rng.normal(size=(2, length, 2, 3)) * 4.0 ** rng.integers(-9, 9)


def exact(x, ids, num_ids):
    sums = np.zeros((len(x), num_ids, *x.shape[2:]))
    for b, t in np.ndindex(ids.shape):
        if 0 <= ids[b, t] < num_ids:
            sums[b, ids[b, t]] += np.asarray(x[b, t], np.float64)
    return sums


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([1, 7, TILE, TILE + 1, 3 * TILE - 1, 5 * TILE]),
    num_ids=st.sampled_from([1, 5, 64]),
    stretch=st.sampled_from([1, 4.5, 40, 1000]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_sums_are_exact_but_for_float32_rounding(form, seed, length, num_ids, stretch, dtype):
    """An error of at most the number of terms times a unit of each of them; the same bits again."""
    ids, x = runs(seed, length, num_ids, stretch)
    x = jnp.asarray(x, dtype)
    sums = jax.jit(form, static_argnums=2)(x, ids, num_ids)
    assert sums.dtype == jnp.float32
    wide = np.asarray(x, np.float64)
    room = UNIT * max(np.bincount(ids.ravel() + 1)) * exact(np.abs(wide), ids, num_ids)
    assert (np.abs(np.asarray(sums, np.float64) - exact(wide, ids, num_ids)) <= room).all()
    np.testing.assert_array_equal(sums, jax.jit(form, static_argnums=2)(x, ids, num_ids))


@pytest.mark.parametrize("form", FORMS)
def test_on_a_mesh(form, use_mesh):
    """Rows and heads that are sharded stay so, and sums are the same bits."""
    ids, x = runs(0, 300, 80, 4.5)
    ids, x = np.concatenate([ids, ids]), np.concatenate([x, 2 * x]).astype(np.float32)
    expected = np.asarray(form(jnp.asarray(x), jnp.asarray(ids), 80))
    with use_mesh(2, 2, 2):
        place = sharding.spec("batch", None, "heads", None)
        put = jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), place))
        sums = jax.jit(form, static_argnums=2)(put, sharding.shard_rows(ids), 80)
        assert jax.typeof(sums).sharding.spec == place
        np.testing.assert_allclose(sums, expected, atol=1e-6 * np.abs(x).max())
