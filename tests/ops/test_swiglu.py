"""SwiGLU against JAX's own silu, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.ops import platform
from bltjax.ops.swiglu import swiglu


@pytest.mark.parametrize("device", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients(dtype, device, monkeypatch):
    monkeypatch.setattr(platform, "platform", lambda: device)
    a, b, cotangent = 4 * jax.random.normal(jax.random.key(0), (3, 5, 7, 33), dtype)
    a = a.at[0, 0, :4].set(jnp.array([-1e30, -200.0, 200.0, 0.0], dtype))

    def plain(a, b):
        return jax.nn.silu(a) * b

    exact = [x.astype(jnp.float32) for x in (a, b, cotangent)]
    expected, pull_back = jax.vjp(plain, *exact[:2])
    result, pull_back_swiglu = jax.vjp(swiglu, a, b)
    results = result, *pull_back_swiglu(cotangent)
    for x, value in zip(results, (expected, *pull_back(exact[2])), strict=True):
        assert x.dtype == dtype
        # Rounded once: half a unit in the last place of bfloat16 is 2^-9.
        np.testing.assert_allclose(
            x.astype(jnp.float32), value, rtol=1e-5 if dtype == "float32" else 2**-8, atol=1e-6
        )
