"""Cross-attention between bytes and patches (spec 5.5).

Both directions share parameters' names and shapes: pre-norm on queries and keys/values, no rotary
embedding, heads of the local width, residual on the un-normalised queries.
"""

import jax
from flax import nnx

from bltjax.model.parameters import Linear, RMSNorm
from bltjax.model.transformer import (
    depth_factor,
    merge_heads,
    repeat_heads,
    split_heads,
    stack_layers,
)
from bltjax.ops.attention import bytes_from_patches_attention, patches_from_bytes_attention


class CrossAttention(nnx.Module):
    """`heads` are the numbers of query heads and of key/value heads."""

    def __init__(self, dim, heads, eps, std, key):
        num_heads, num_kv_heads = heads
        self.head_width = dim // num_heads
        self.group_size = num_heads // num_kv_heads
        kv_dim = num_kv_heads * self.head_width
        self.cross_attn_norm_q = RMSNorm(dim, eps)
        self.cross_attn_norm_kv = RMSNorm(dim, eps)
        kq, kk, kv, ko = jax.random.split(key, 4)
        self.wq = Linear(dim, dim, std=std, axes=("heads", "embed"), key=kq)
        self.wk = Linear(kv_dim, dim, std=std, axes=("heads", "embed"), key=kk)
        self.wv = Linear(kv_dim, dim, std=std, axes=("heads", "embed"), key=kv)
        self.wo = Linear(dim, dim, std=std, axes=("embed", "heads"), key=ko)

    def patches_from_bytes(self, patches, h, patch_ids, k, window):
        """What the k vectors of each patch read from its bytes.

        patches [B, P*k, E], h [B, L, E], patch_ids int32 [B, L] -> [B, P*k, E].
        """
        q, keys, values = self._project(patches, h)
        out = patches_from_bytes_attention(split_slots(q, k), keys, values, patch_ids, window)
        return self.wo(merge_heads(merge_slots(out)))

    def bytes_from_patches(self, h, patches, patch_ids, k, window):
        """What each byte reads from the k vectors of its patch.

        h [B, L, E], patches [B, P*k, E], patch_ids int32 [B, L] -> [B, L, E].
        """
        q, keys, values = self._project(h, patches)
        out = bytes_from_patches_attention(
            q, split_slots(keys, k), split_slots(values, k), patch_ids, window
        )
        return self.wo(merge_heads(out))

    def keys_values(self, kv):
        """kv [B, L, E] -> keys, values [B, L, G, D], to be kept for `read`."""
        kv = self.cross_attn_norm_kv(kv)
        return tuple(split_heads(w(kv), self.head_width) for w in (self.wk, self.wv))

    def read(self, x, attend):
        """What x [B, L, E] reads; attend: queries [B, L, H, D] -> [B, L, H, D]."""
        q = split_heads(self.wq(self.cross_attn_norm_q(x)), self.head_width)
        return self.wo(merge_heads(attend(q)))

    def _project(self, x, kv):
        q = split_heads(self.wq(self.cross_attn_norm_q(x)), self.head_width)
        keys, values = self.keys_values(kv)
        return q, repeat_heads(keys, self.group_size), repeat_heads(values, self.group_size)


def make_cross_layers(dim, heads, eps, init, num_layers, num_blocks, key) -> CrossAttention:
    """`num_layers` stacked cross-attention layers beside `num_blocks` blocks (spec 6).

    heads: the numbers of query heads and of key/value heads.
    """

    def make(index, key):
        std = dim**-0.5 / depth_factor(init, dim, index, num_blocks)
        return CrossAttention(dim, heads, eps, std, key)

    return stack_layers(make, num_layers, key)


def add_residual(x, read, doubled: bool):
    """x + read inside the layer, and the caller's second x (spec 5.5): 2x + read as published."""
    return 2 * x + read if doubled else x + read


def split_slots(x, k: int):
    """[B, P*k, ...] -> [B, P, k, ...]; slot r of patch j is row j*k + r."""
    batch, _, *rest = jax.typeof(x).sharding.spec
    return jax.lax.reshape(
        x,
        (x.shape[0], x.shape[1] // k, k, *x.shape[2:]),
        out_sharding=jax.P(batch, None, None, *rest),
    )


def merge_slots(x):
    """[B, P, k, ...] -> [B, P*k, ...]."""
    batch, _, _, *rest = jax.typeof(x).sharding.spec
    return jax.lax.reshape(
        x,
        (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]),
        out_sharding=jax.P(batch, None, *rest),
    )
