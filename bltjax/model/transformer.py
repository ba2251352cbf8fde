"""The transformer block of all stacks: rotary attention and SwiGLU, pre-norm (model.md#block)."""

import jax
import jax.numpy as jnp
from flax import nnx

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig, InitConfig, TransformerConfig
from bltjax.model.parameters import Linear, RMSNorm
from bltjax.ops.attention import Choice, attention_of_rows, choose_attention
from bltjax.ops.rotary import apply_rotary, lay_out, rotary_factors
from bltjax.ops.swiglu import swiglu

Model = BLTConfig | EntropyModelConfig


def depth_factor(init: InitConfig, dim: int, index, num_layers: int):
    """Returns the divisor of a standard deviation; `index` may be traced.

    See model.md#initial-weights.
    """
    if init.std_factor == "current_depth":
        return jnp.sqrt(2.0 * (jnp.asarray(index, jnp.float32) + 1))
    if init.std_factor == "global_depth":
        return jnp.sqrt(2.0 * (num_layers + 1))
    return dim / 4096 if init.std_factor == "dim_ratio" else 1.0


def initial_std(init: InitConfig, fan_in: int, factor):
    """Returns fan_in^-0.5 / factor; a base_std replaces both, as published."""
    return fan_in**-0.5 / factor if init.base_std is None else init.base_std


class Attention(nnx.Module):
    def __init__(self, config: TransformerConfig, init, factor, key):
        self.config = config
        std = initial_std(init, config.dim, factor)
        q_dim, kv_dim = (n * config.head_width for n in (config.num_heads, config.kv_heads))
        kq, kk, kv, ko = jax.random.split(key, 4)
        to_heads = dict(std=std, axes=("heads", "embed"), bias=config.qkv_bias)
        self.wq = Linear(q_dim, config.dim, **to_heads, key=kq)
        self.wk = Linear(kv_dim, config.dim, **to_heads, key=kk)
        self.wv = Linear(kv_dim, config.dim, **to_heads, key=kv)
        self.wo = Linear(config.dim, q_dim, std=std, axes=("embed", "heads"), key=ko)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_width, config.norm_eps)
            self.k_norm = RMSNorm(config.head_width, config.norm_eps)

    def __call__(self, x, factors, attend):
        """Maps x [B, L, E] -> [B, L, E].

        factors: those of `lay_out` for queries, and for keys. attend(q, k, v): q [B, L, H, D];
        k, v [B, L, G, D] -> [B, L, H, D].
        """
        q, k, v = (split_heads(w(x), self.config.head_width) for w in (self.wq, self.wk, self.wv))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, factors[0]), apply_rotary(k, factors[1])
        return self.wo(merge_heads(attend(q, k, v)))


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

    def __call__(self, x, factors, attend):
        """Applies `Attention` and the feed-forward layer, each with its residual."""
        x = x + self.attention(self.attention_norm(x), factors, attend)
        return x + self.feed_forward(self.ffn_norm(x))


def make_blocks(config: TransformerConfig, init: InitConfig, key) -> Block:
    """Makes all blocks of a stack as one Block whose parameters have a leading layer axis."""
    return stack_layers(lambda index, key: Block(config, init, index, key), config.num_layers, key)


def stack_layers(make, num_layers: int, key):
    """Stacks the results of `make(index, key)` of all layers."""
    return jax.vmap(make)(jnp.arange(num_layers), jax.random.split(key, num_layers))


def layer_slice(layers, start: int, stop: int | None):
    """Returns layers start .. stop - 1 of a stack, still stacked."""
    return jax.tree.map(lambda w: w[start:stop], layers)


def each_layer(layers) -> list:
    """Lists the layers of a stack."""
    (num_layers,) = {len(w) for w in jax.tree.leaves(layers)}
    return [jax.tree.map(lambda w, i=i: w[i], layers) for i in range(num_layers)]


def scan_layers(layers, carry, apply, remat: str):
    """Runs carry = apply(layer, carry) through a stack; returns the last carry and all of them.

    remat: "none" keeps all intermediates for the backward pass, "dots" the results of linear layers
    and of self-attention, "full" only the carries.
    """

    def step(carry, layer):
        carry = apply(layer, carry)
        return carry, carry

    return jax.lax.scan(rematerialised(step, remat), carry, layers)


def rematerialised(function, remat: str):
    """Wraps a function so that the backward pass computes it again, see `scan_layers`."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names("linear", "attention")
    return jax.checkpoint(function, policy=policy if remat == "dots" else None)


def run_blocks(blocks: Block, stack: TransformerConfig, x, segments, model: Model):
    """Runs x [B, L, E] through all blocks of a stack of a model."""
    return scan_layers(blocks, x, block_of_rows(stack, segments, model), model.remat)[0]


def block_of_rows(stack: TransformerConfig, segments, model: Model):
    """Returns run_block(block, x) for rows x [B, L, E] whose positions see their segment [B, L]."""
    factors, attend = attention_of(stack, segments, model)
    return lambda block, x: block(x, factors, attend)


def attention_of(stack: TransformerConfig, segments, model: Model):
    """Returns what `Attention` wants beside x [B, L, E]: factors, and attend."""
    factors = rotary_of(stack, jnp.arange(segments.shape[1]))
    name = attention_kernel(stack, model).name
    # Splash kernels leave scores as they are: the turn of queries scales them for nothing.
    scale = stack.head_width**-0.5 if name == "splash" else 1.0
    factors = lay_out(factors, scale), lay_out(factors)
    return factors, attention_of_rows(segments, stack.window, name, model.attention_block)


def rotary_of(stack: TransformerConfig, positions):
    """Returns the `rotary_factors` of a stack at positions [...]."""
    scaling = stack.rope_factor, stack.rope_original_positions
    return rotary_factors(positions, stack.head_width, stack.rope_theta, *scaling)


def attention_kernel(stack: TransformerConfig, model: Model) -> Choice:
    """Chooses the kernel of self-attention of a stack of a model, for the mesh that is set."""
    return choose_attention(model.attention, model.compute_dtype, stack.head_width)


def attention_report(model: Model) -> str:
    """Says which kernels of self-attention a model has on the mesh that is set, and why.

    Raises ValueError where the one that is set cannot work there.
    """
    if isinstance(model, EntropyModelConfig):
        names = ("transformer",)
    else:
        names = ("local_encoder", "global_transformer", "local_decoder")
    stacks: dict[Choice, list[str]] = {}
    for name in names:
        stacks.setdefault(attention_kernel(getattr(model, name), model), []).append(name)
    told = [f"{kernel.name} ({kernel.reason}) in {', '.join(s)}" for kernel, s in stacks.items()]
    return f"attention: {'; '.join(told)}"


def split_heads(x, head_width: int):
    """Splits [B, L, H*D] -> [B, L, H, D], heads over the tensor axis."""
    shape = *x.shape[:2], x.shape[2] // head_width, head_width
    return jax.lax.reshape(x, shape, out_sharding=sharding.spec("batch", None, "heads", None))


def repeat_heads(x, times: int):
    """Repeats each head `times` times in a row: [B, L, G, D] -> [B, L, G*times, D]."""
    if times == 1:
        return x
    batch, length, heads, width = x.shape
    spread = jnp.broadcast_to(x[:, :, :, None], (batch, length, heads, times, width))
    shape = batch, length, heads * times, width
    return jax.lax.reshape(spread, shape, out_sharding=sharding.spec("batch", None, "heads", None))


def merge_heads(x):
    """Joins heads: [B, L, H, D] -> [B, L, H*D]."""
    shape = *x.shape[:2], x.shape[2] * x.shape[3]
    return jax.lax.reshape(x, shape, out_sharding=sharding.spec("batch", None, "heads"))
