"""Sums of rows that chips ask each other for, against NumPy's indexing."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax import sharding
from bltjax.model import hash_tables
from bltjax.ops import row_exchange
from tests.conftest import mesh_of

pytestmark = pytest.mark.long  # one interpreter will do

B, L, T, ROWS, E = 8, 40, 3, 64, 8
MESHES = [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]


@functools.partial(jax.jit, static_argnums=3)
def run(tables, ids, gradient, dtype):
    """Sum of rows [B, L, E] and gradient of the tables, laid out as in a model."""
    tables = jax.sharding.reshard(tables, sharding.table_spec(*tables.shape[1:]))
    ids, gradient = sharding.shard_rows((ids, gradient.astype(dtype)))
    result, pull = jax.vjp(lambda tables: hash_tables.lookup_sum(tables, ids, dtype), tables)
    (of_tables,) = pull(gradient)
    assert jax.typeof(of_tables) == jax.typeof(tables)
    assert jax.typeof(result) == jax.typeof(gradient)
    return result, of_tables


def on_mesh(sizes, *arguments):
    with jax.set_mesh(mesh_of(*sizes)):
        return jax.device_get(run(*arguments))


def operands(rows=ROWS, dim=E, seed=0):
    """Tables, and a gradient of what is looked up in them."""
    rng = np.random.default_rng(seed)
    tables, gradient = rng.normal(0, 1, (T, rows, dim)), rng.normal(0, 1, (B, L, dim))
    return tables.astype(np.float32), gradient.astype(np.float32)


def expected(tables, ids, gradient):
    """In float64."""
    tables, gradient = np.float64(tables), np.float64(gradient)
    of_tables = np.zeros_like(tables)
    for t in range(T):
        np.add.at(of_tables[t], ids[..., t], gradient)
    return sum(tables[t][ids[..., t]] for t in range(T)), of_tables


@st.composite
def row_ids(draw):
    """Even, skewed, of one owner alone, or one row for all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = {
        "even": rng.integers(0, ROWS, (B, L, T)),
        "skewed": np.minimum(rng.zipf(1.3, (B, L, T)), ROWS) - 1,
        "one chip asks": rng.integers(0, ROWS, (B, L, T)) * np.eye(B, dtype=int)[3, :, None, None],
        "one owner": rng.integers(0, 8, (B, L, T)) + 8 * rng.integers(0, 8),
        "one row": np.full((B, L, T), rng.integers(0, ROWS)),
    }
    ids = kinds[draw(st.sampled_from(list(kinds)))]
    return ids.astype(np.int32)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@hypothesis.given(ids=row_ids())
@hypothesis.settings(max_examples=12)
def test_rows_and_gradients_are_those_of_numpy(sizes, ids):
    tables, gradient = operands()
    result, of_tables = on_mesh(sizes, tables, ids, gradient, "float32")
    of_numpy = expected(tables, ids, gradient)
    np.testing.assert_allclose(result, of_numpy[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(of_tables, of_numpy[1], rtol=1e-5, atol=1e-4)
    assert not of_tables[of_numpy[1] == 0].any()  # rows that nobody asked for


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_a_mesh_changes_no_bit_where_a_round_is_enough(sizes):
    """With few rows at least; more rounds add up in another order."""
    tables, gradient = operands()
    rng = np.random.default_rng(1)
    ids = (8 * rng.integers(0, 8, (B, L, T)) + rng.integers(0, 2, (B, L, T))).astype(np.int32)
    for dtype in ("float32", "bfloat16"):
        alone = on_mesh((1, 1, 1), tables, ids, gradient, dtype)[0]
        np.testing.assert_array_equal(on_mesh(sizes, tables, ids, gradient, dtype)[0], alone)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_in_bfloat16_rows_are_rounded_and_sums_are_of_float32(sizes):
    tables, gradient = operands()
    gradient += 1.0  # so that a sum of bfloat16 numbers would stop growing
    ids = np.zeros((B, L, T), np.int32)
    ids[:, 0, 1:] = [17, 63]
    result, of_tables = on_mesh(sizes, tables, ids, gradient, "bfloat16")
    of_numpy = expected(tables.astype(result.dtype), ids, gradient.astype(result.dtype))
    assert result.dtype == jnp.bfloat16 and of_tables.dtype == np.float32
    np.testing.assert_array_equal(result, of_numpy[0].astype(np.float32).astype(result.dtype))
    np.testing.assert_allclose(of_tables, of_numpy[1], rtol=1e-6)


@pytest.mark.parametrize("rows, dim", [(61, 8), (64, 7), (61, 7)])
def test_what_does_not_divide_is_whole_on_every_chip(rows, dim, use_mesh):
    tables, gradient = operands(rows, dim)
    ids = np.random.default_rng(0).integers(0, rows, (B, L, T)).astype(np.int32)
    with use_mesh(2, 2, 2):
        assert sharding.table_spec(rows, dim) == jax.P(
            None, ("data", "fsdp") if rows == 64 else None, "tensor" if dim == 8 else None
        )
        result, of_tables = jax.device_get(run(tables, ids, gradient, "float32"))
    of_numpy = expected(tables, ids, gradient)
    np.testing.assert_allclose(result, of_numpy[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(of_tables, of_numpy[1], rtol=1e-5, atol=1e-5)


def test_only_rows_that_are_asked_for_travel(use_mesh):
    """No collective has as many numbers as a chip's share of the tables, let alone of all."""
    rows = 4096
    tables, gradient = operands(rows, 16)
    ids = np.zeros((B, L, T), np.int32)
    with use_mesh(2, 4, 1):
        text = run.lower(tables, ids, gradient, "float32").compile().as_text()
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    moved = re.findall(rf"= (.*?) ({kinds})", text)
    sizes = [  # a result may be a tuple, of a message from each chip
        sum(
            np.prod([int(n) for n in of.split(",") if n]) for of in re.findall(r"\[(.*?)\]", result)
        )
        for result, _ in moved
    ]
    messages = 8 * 8 * 16  # from each chip, rows, features
    assert max(sizes) == messages < T * rows * 16 / 8


def test_messages_have_room_for_a_quarter_of_the_ids():
    def room(ids, owners):
        some = jnp.zeros(0, jnp.int32)
        route = row_exchange._Route(some, jnp.zeros(owners + 1), some, some, jnp.zeros(ids), some)
        return route.room

    assert room(6 * 16384, 256) == 96
    assert room(6 * 16384, 1024) == 24
    assert room(6 * 40, 256) == 8


def test_more_rows_than_int32_numbers_are_refused():
    tables = jax.ShapeDtypeStruct((16, 2**28, 1), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 4, 16), jnp.int32)
    with pytest.raises(ValueError, match="4294967296 rows together, at most 2147483647"):
        jax.eval_shape(lambda *x: row_exchange.lookup_sum(*x, jnp.float32), tables, ids)
