"""The transformer block of all stacks: rotary attention and SwiGLU, pre-norm (spec 5.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from bltjax import sharding
from bltjax.config import InitConfig, TransformerConfig
from bltjax.model.parameters import Linear, RMSNorm
from bltjax.ops.attention import causal_attention, window_attention
from bltjax.ops.rotary import apply_rotary, rotary_angles
from bltjax.ops.swiglu import swiglu


def depth_factor(init: InitConfig, dim: int, index, num_layers: int):
    """What an initial standard deviation is divided by; `index` may be traced (spec 6)."""
    if init.std_factor == "current_depth":
        return jnp.sqrt(2.0 * (index + 1))
    if init.std_factor == "global_depth":
        return jnp.sqrt(2.0 * (num_layers + 1))
    return dim / 4096 if init.std_factor == "dim_ratio" else 1.0


def initial_std(init: InitConfig, fan_in: int, factor):
    """fan_in^-0.5 / factor; a base_std replaces both, as published (spec 6)."""
    return fan_in**-0.5 / factor if init.base_std is None else init.base_std


class Attention(nnx.Module):
    def __init__(self, config: TransformerConfig, init, factor, key):
        self.config = config
        std = initial_std(init, config.dim, factor)
        q_dim, kv_dim = (n * config.head_width for n in (config.num_heads, config.kv_heads))
        kq, kk, kv, ko = jax.random.split(key, 4)
        self.wq = Linear(q_dim, config.dim, std=std, axes=("heads", "embed"), key=kq)
        self.wk = Linear(kv_dim, config.dim, std=std, axes=("heads", "embed"), key=kk)
        self.wv = Linear(kv_dim, config.dim, std=std, axes=("heads", "embed"), key=kv)
        self.wo = Linear(config.dim, q_dim, std=std, axes=("embed", "heads"), key=ko)

    def __call__(self, x, angles, attend):
        """x [B, L, E], angles [L, D/2] or [B, L, D/2] -> [B, L, E], and the keys and values.

        attend(q, k, v): q [B, L, H, D]; k, v [B, L, G, D] -> [B, L, H, D].
        """
        q, k, v = (split_heads(w(x), self.config.head_width) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rotary(q, angles), apply_rotary(k, angles)
        return self.wo(merge_heads(attend(q, k, v))), (k, v)


class FeedForward(nnx.Module):
    def __init__(self, config: TransformerConfig, init, factor, key):
        dim, hidden = config.dim, config.ffn_dim
        k1, k2, k3 = jax.random.split(key, 3)
        std_in, std_out = (initial_std(init, n, factor) for n in (dim, hidden))
        self.w1 = Linear(hidden, dim, std=std_in, axes=("ffn", "embed"), key=k1)
        self.w2 = Linear(dim, hidden, std=std_out, axes=("embed", "ffn"), key=k2)
        self.w3 = Linear(hidden, dim, std=std_in, axes=("ffn", "embed"), key=k3)

    def __call__(self, x):
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Block(nnx.Module):
    def __init__(self, config: TransformerConfig, init, index, key):
        factor = depth_factor(init, config.dim, index, config.num_layers)
        key_attention, key_ffn = jax.random.split(key)
        self.attention = Attention(config, init, factor, key_attention)
        self.feed_forward = FeedForward(config, init, factor, key_ffn)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def __call__(self, x, angles, attend):
        """As `Attention`, with the residuals and the feed-forward layer."""
        read, keys_values = self.attention(self.attention_norm(x), angles, attend)
        x = x + read
        return x + self.feed_forward(self.ffn_norm(x)), keys_values


def make_blocks(config: TransformerConfig, init: InitConfig, key) -> Block:
    """All blocks of a stack as one Block whose parameters have a leading layer axis."""
    return stack_layers(lambda index, key: Block(config, init, index, key), config.num_layers, key)


def stack_layers(make, num_layers: int, key):
    """vmap of `make(index, key)` over layers."""
    return jax.vmap(make)(jnp.arange(num_layers), jax.random.split(key, num_layers))


def layer_slice(layers, start: int, stop: int | None):
    """Some of the stacked layers, still stacked."""
    return jax.tree.map(lambda w: w[start:stop], layers)


def each_layer(layers) -> list:
    """The layers of a stack one by one, where they are stacked and where they are not."""
    if isinstance(layers, nnx.List):
        return list(layers)
    (num_layers,) = {len(w) for w in jax.tree.leaves(layers)}
    return [jax.tree.map(lambda w, i=i: w[i], layers) for i in range(num_layers)]


def scan_layers(layers, carry, apply, remat: str):
    """carry = apply(layer, carry) through the stacked layers; also every carry [layers, ...].

    remat: "none" keeps all intermediates for the backward pass, "dots" the results of linear layers
    and of self-attention, "full" only the carries.
    """

    def step(carry, layer):
        carry = apply(layer, carry)
        return carry, carry

    return jax.lax.scan(rematerialised(step, remat), carry, layers)


def rematerialised(function, remat: str):
    """The function, computed again in the backward pass as `scan_layers` says."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names("linear", "attention")
    return jax.checkpoint(function, policy=policy if remat == "dots" else None)


def run_blocks(blocks: Block, config: TransformerConfig, x, segments, remat: str):
    """x [B, L, E] through all blocks of a stack."""
    run_block = block_of_rows(config, segments)
    return scan_layers(blocks, x, run_block, remat)[0]


def block_of_rows(config: TransformerConfig, segments):
    """run_block(block, x) of whole rows x [B, L, E], whose positions see their segment [B, L]."""
    angles = rotary_angles(segments.shape[1], config.head_width, config.rope_theta)

    def attend(q, k, v):
        if config.window is None:
            return causal_attention(q, k, v, segments)
        return window_attention(q, k, v, segments, config.window)

    return lambda block, x: block(x, angles, attend)[0]


def split_heads(x, head_width: int):
    """[B, L, H*D] -> [B, L, H, D], heads over the tensor axis."""
    return jax.lax.reshape(
        x,
        (*x.shape[:2], x.shape[2] // head_width, head_width),
        out_sharding=sharding.spec("batch", None, "heads", None),
    )


def repeat_heads(x, times: int):
    """[B, L, G, D] -> [B, L, G*times, D]: a key/value head serves `times` query heads in a row."""
    if times == 1:
        return x
    batch, length, heads, width = x.shape
    spread = jnp.broadcast_to(x[:, :, :, None], (batch, length, heads, times, width))
    return jax.lax.reshape(
        spread,
        (batch, length, heads * times, width),
        out_sharding=sharding.spec("batch", None, "heads", None),
    )


def merge_heads(x):
    """[B, L, H, D] -> [B, L, H*D]."""
    return jax.lax.reshape(
        x,
        (*x.shape[:2], x.shape[2] * x.shape[3]),
        out_sharding=sharding.spec("batch", None, "heads"),
    )
