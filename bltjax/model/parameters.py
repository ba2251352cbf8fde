"""Parameters and the layers that own them, under the published names (model.md#parameters).

Matrices keep the published layout [out, in] and compute y = x W^T, so published weights need no
transpose. Parameters are float32, and are cast to the activations' dtype where they are used.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bltjax import sharding
from bltjax.ops.norm import rms_norm


def truncated_normal(key, shape, std, spec):
    """Draws from a normal cut at 3 sigma, created sharded (model.md#initial-weights)."""
    return std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32, out_sharding=spec)


class Linear(nnx.Module):
    """Linear layer y = x W^T; `axes` are the logical axes of W [out, in].

    A bias, which is 0 at first, is an option.
    """

    def __init__(self, out_dim, in_dim, *, std, axes, key, bias=False):
        self.axes = axes
        self.weight = nnx.Param(truncated_normal(key, (out_dim, in_dim), std, sharding.spec(*axes)))
        if bias:
            spec = sharding.spec(axes[0])
            self.bias = nnx.Param(jnp.zeros(out_dim, jnp.float32, out_sharding=spec))

    def __call__(self, x):
        """Maps x [B, L, in] -> [B, L, out]."""
        y = _project(self.axes, x, self.weight[...])
        if hasattr(self, "bias"):
            y = add_bias(y, self.bias[...])
        if hasattr(self, "lora_A"):  # an adapter, see lora.py
            y = y + self._adapter(x)
        return checkpoint_name(y, "linear")

    def _adapter(self, x):
        out_axis, in_axis = self.axes
        if hasattr(self, "dropout_key"):
            x = drop(self.dropout_key[...], self.dropout, x)
        low = _project((None, in_axis), x, self.lora_A.weight[...])
        return self.lora_scale * _project((out_axis, None), low, self.lora_B.weight[...])


class Matrix(nnx.Module):
    """A parameter of an adapter, under a name of its own."""

    def __init__(self, weight):
        self.weight = nnx.Param(weight)


def add_bias(x, bias):
    """Adds a bias [...] to x [B, L, ...], in float32: its gradient is a sum over positions."""
    return (x.astype(jnp.float32) + jnp.expand_dims(bias, (0, 1))).astype(x.dtype)


def drop(key, share: float, x):
    """Sets a share of the elements of x to 0, and scales the others up."""
    spec = jax.typeof(x).sharding.spec
    kept = jax.random.bernoulli(key, 1 - share, x.shape, out_sharding=spec)
    return jnp.where(kept, x / (1 - share), 0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(axes, x, weight):
    """Multiplies x [B, L, in] by a float32 weight [out, in], in the precision of x.

    The backward pass gathers the weight again rather than keep it whole, and adds up its gradient
    in float32, over the positions of a chip and over chips, whatever the precision of x: JAX's own
    derivative would add bfloat16 numbers of all chips (model.md#precision).
    """
    split = axes[0] if axes[0] in ("heads", "ffn") else None
    whole = sharding.gather_weight(weight.astype(x.dtype))
    spec = sharding.spec("batch", None, split)
    return jnp.einsum("bli,oi->blo", x, whole, out_sharding=spec)


def _project_forward(axes, x, weight):
    return _project(axes, x, weight), (x, weight)


def _project_backward(axes, saved, gradient):
    x, weight = saved
    whole = sharding.gather_weight(weight.astype(x.dtype))
    split = axes[1] if axes[1] in ("heads", "ffn") else None
    spec, weight_spec = sharding.spec("batch", None, split), sharding.spec(*axes)
    dx = jnp.einsum("blo,oi->bli", gradient, whole, out_sharding=spec)
    dw = jnp.einsum(
        "blo,bli->oi", gradient, x, preferred_element_type=jnp.float32, out_sharding=weight_spec
    )
    return dx, dw.astype(weight.dtype)


_project.defvjp(_project_forward, _project_backward)


class Embedding(nnx.Module):
    """Table of a row per byte id, whole on every device: 260 rows are not worth splitting."""

    def __init__(self, rows, dim, *, std, key):
        self.weight = nnx.Param(truncated_normal(key, (rows, dim), std, sharding.spec(None, None)))

    def __call__(self, ids, dtype):
        """Looks up ids int32 [B, L] -> [B, L, dim].

        Casts after the lookup: the gradient adds up a row's many uses, and must do so in float32.
        """
        return sharding.lookup(self.weight[...], ids).astype(dtype)


class RMSNorm(nnx.Module):
    def __init__(self, dim, eps):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(dim, jnp.float32))

    def __call__(self, x):
        return rms_norm(x, self.weight[...], self.eps)
