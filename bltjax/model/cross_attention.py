"""Cross-attention between bytes and patches (model.md#cross-attention).

Both directions have parameters of the same names and shapes: pre-norm on queries and keys/values,
no rotary embedding, heads of the local width, residual on the un-normalised queries. A patch is K
vectors of local width: side by side as [B, P, K*E], or in a row as [B, P*K, E].
"""

import jax
from flax import nnx

from bltjax.config import TransformerConfig
from bltjax.model.parameters import Linear, RMSNorm
from bltjax.model.transformer import (
    depth_factor,
    merge_heads,
    repeat_heads,
    split_heads,
    stack_layers,
)
from bltjax.ops.cross_attention import bytes_from_patches_attention, patches_from_bytes_attention


class CrossAttention(nnx.Module):
    """One layer; heads: the numbers of query heads and of key/value heads."""

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
        """Attends from the k vectors of each patch to its bytes.

        patches [B, P*k, E], h [B, L, E], patch_ids int32 [B, L] -> [B, P*k, E].
        """
        keys, values = self._keys_values_for_all_heads(h)

        def attend(q):
            out = patches_from_bytes_attention(split_vectors(q, k), keys, values, patch_ids, window)
            return merge_vectors(out)

        return self.read(patches, attend)

    def bytes_from_patches(self, h, patches, patch_ids, k, window):
        """Attends from each byte to the k vectors of its patch.

        h [B, L, E], patches [B, P*k, E], patch_ids int32 [B, L] -> [B, L, E]. There may be several
        h, as a pytree, each with patch_ids of its own.
        """
        keys, values = (split_vectors(x, k) for x in self._keys_values_for_all_heads(patches))

        def read(h, patch_ids):
            return self.read(
                h, lambda q: bytes_from_patches_attention(q, keys, values, patch_ids, window)
            )

        return jax.tree.map(read, h, patch_ids)

    def keys_values(self, kv):
        """Projects kv [B, L, E] -> keys, values [B, L, G, D], which `read` may attend to."""
        kv = self.cross_attn_norm_kv(kv)
        return tuple(split_heads(w(kv), self.head_width) for w in (self.wk, self.wv))

    def read(self, x, attend):
        """Attends from x [B, L, E] -> [B, L, E]; attend: queries [B, L, H, D] -> [B, L, H, D]."""
        q = split_heads(self.wq(self.cross_attn_norm_q(x)), self.head_width)
        return self.wo(merge_heads(attend(q)))

    def _keys_values_for_all_heads(self, kv):
        return (repeat_heads(x, self.group_size) for x in self.keys_values(kv))


def make_cross_layers(config: TransformerConfig, heads, init, all_layers, key) -> CrossAttention:
    """Makes stacked cross-attention layers beside a stack of blocks: a single one, or for all.

    heads: the numbers of query heads and of key/value heads. See model.md#initial-weights.
    """

    def make(index, key):
        std = config.dim**-0.5 / depth_factor(init, config.dim, index, config.num_layers)
        return CrossAttention(config.dim, heads, config.norm_eps, std, key)

    return stack_layers(make, config.num_layers if all_layers else 1, key)


def add_residual(x, read, doubled: bool):
    """Returns x + read, or 2x + read as published, where layer and caller both add x."""
    return 2 * x + read if doubled else x + read


def split_vectors(x, k: int):
    """Splits [B, P*k, ...] -> [B, P, k, ...]; vector r of patch j is row j*k + r."""
    batch, _, *rest = jax.typeof(x).sharding.spec
    shape = x.shape[0], x.shape[1] // k, k, *x.shape[2:]
    return jax.lax.reshape(x, shape, out_sharding=jax.P(batch, None, None, *rest))


def merge_vectors(x):
    """Joins [B, P, k, ...] -> [B, P*k, ...]."""
    batch, _, _, *rest = jax.typeof(x).sharding.spec
    shape = x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]
    return jax.lax.reshape(x, shape, out_sharding=jax.P(batch, None, *rest))


def wide_to_vectors(patches, k: int):
    """Splits patches [B, P, k*E] -> their vectors [B, P*k, E]."""
    return merge_vectors(patches.reshape(*patches.shape[:2], k, patches.shape[2] // k))


def vectors_to_wide(vectors, k: int):
    """Puts the k vectors of each patch side by side: [B, P*k, E] -> [B, P, k*E]."""
    split = split_vectors(vectors, k)
    return split.reshape(*split.shape[:2], -1)
