"""Formulations for TPUs, which CPUs can compute too, beside those for other devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.config import MeshConfig
from bltjax.costs.hlo_cost import COLLECTIVES
from bltjax.ops import cross_attention, heads, platform
from bltjax.ops.rotary import apply_rotary, lay_out, rotary_factors

B, L, P, K, H, D = 2, 23, 7, 2, 3, 8


def both_forms(monkeypatch, function, *arguments):
    """Returns a function's result and gradients as on CPUs, and as on TPUs."""

    def total(*arguments):
        out = function(*arguments).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    def run():
        places = tuple(range(len(arguments)))
        (_, out), gradients = jax.jit(jax.value_and_grad(total, places, has_aux=True))(*arguments)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), (out, *gradients))

    plain = run()
    monkeypatch.setattr(platform, "platform", lambda: "tpu")
    return plain, run()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weighed_heads(monkeypatch, dtype):
    """A product with spread weights, and its gradients."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(B, L, H * D)), dtype)
    weights = jnp.asarray(rng.normal(size=(B, L, H)), jnp.float32)

    def plain(weights, x):
        return jnp.repeat(weights, D, axis=-1) * x.astype(jnp.float32)

    expected = both_forms(monkeypatch, plain, weights, x)[0]
    monkeypatch.undo()
    exact = dtype == jnp.float32
    weigh = functools.partial(heads.weigh_heads, width=D, exact=exact)
    for found in both_forms(monkeypatch, lambda *inputs: weigh(*inputs), weights, x):
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(other, one, atol=2e-4 * np.abs(one).max(), rtol=1e-2)


@settings(max_examples=20, deadline=None)
@given(num_heads=st.integers(1, 5), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_sums_and_spreads(num_heads, width, seed):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(3, num_heads * width)), jnp.float32)
    expected = np.asarray(x).reshape(3, num_heads, width).sum(-1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cpu", "tpu"):
            patch.setattr(platform, "platform", lambda name=name: name)
            np.testing.assert_allclose(heads.sum_heads(x, num_heads), expected, atol=1e-5)
            spread = heads.spread_heads(x[:, :num_heads], width)
            np.testing.assert_array_equal(spread, np.repeat(x[:, :num_heads], width, axis=-1))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_cross_attention(monkeypatch, side, window, dtype, tolerance):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.sort(rng.integers(0, P, (B, L)), axis=1), jnp.int32)
    of_bytes, of_patches = (B, L, H, D), (B, P, K, H, D)
    if side == "encoder":
        function, shapes = cross_attention.patches_from_bytes_attention, (of_patches, of_bytes)
    else:
        function, shapes = cross_attention.bytes_from_patches_attention, (of_bytes, of_patches)
        ids = ids - 1
    q, k, v = (jnp.asarray(rng.normal(size=shapes[i]), dtype) for i in (0, 1, 1))
    attend = functools.partial(function, patch_ids=ids, window=window)
    plain, on_tpu = both_forms(monkeypatch, attend, q, k, v)
    for expected, result in zip(plain, on_tpu, strict=True):
        np.testing.assert_allclose(result, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("positions", [jnp.arange(L), jnp.arange(B * L).reshape(B, L)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [D, 128])
def test_rotary(monkeypatch, positions, dtype, width):
    """A product that swaps pairs is exact, so both forms round the same sums."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, L, H, width)), dtype)
    factors = rotary_factors(positions, width, 10_000.0)
    plain, on_tpu = both_forms(monkeypatch, lambda x: apply_rotary(x, lay_out(factors)), x)
    tolerance = 1e-6 if dtype == jnp.float32 else 0.02
    for expected, result in zip(plain, on_tpu, strict=True):
        np.testing.assert_allclose(result, expected, atol=tolerance * np.abs(expected).max())


def test_shards_exchange_nothing(monkeypatch):
    """Rows and heads stay where they are, with gradients."""
    monkeypatch.setattr(platform, "platform", lambda: "tpu")
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        axes = "batch", None, "heads", None
        x = sharding.reshard(jnp.ones((4, L, 2, D)), sharding.spec(*axes))
        factors = rotary_factors(jnp.arange(L), D, 10_000.0)
        turn = jax.jit(jax.vjp(lambda x: apply_rotary(x, lay_out(factors)), x)[1])
        text = turn.lower(x).compile().as_text()
        assert jax.typeof(turn(x)[0]) == jax.typeof(x)
    assert not any(f" {name}(" in text for name in COLLECTIVES)
