"""Causal and windowed attention on GPUs by tokamax's Mosaic kernels, where it is installed.

The kernels take the range of keys that each query sees. Their backward pass goes through all keys
up to a query's own, so rows with a window are folded: chunks of two windows become rows of a batch,
each with the keys of its chunk and of the window before it.
"""

import functools
import importlib.util
import math

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bltjax.ops.segments import key_starts
from bltjax.ops.slots import on_rows, on_shards

PACKAGE = "tokamax"
DTYPES = ("bfloat16", "float16")
MOST_HEAD_WIDTH = 128
_BLOCK = 128  # lengths are padded to multiples of it


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def first_keys(segments, window: int | None = None):
    """Returns what the kernels need of segments int32 [B, L], the same for all layers."""
    return on_rows(functools.partial(key_starts, window=window), segments)


def mosaic_attention(q, k, v, segments, window: int | None = None, starts=None):
    """Attends from each position to itself and `window` - 1 before it (None: all) in its segment.

    q [B, L, H, D]; k, v [B, L, G, D], G dividing H; segments int32 [B, L] -> [B, L, H, D]. Rows and
    heads may be sharded, positions not. starts: `first_keys(segments, window)`, where many layers
    share it. The backward pass runs the forward kernel again unless remat is "none", for the sums
    of its softmaxes have no name.
    """
    starts = first_keys(segments, window) if starts is None else starts
    attend = functools.partial(_on_device, window=window)
    return checkpoint_name(on_shards(attend, q, k, v, starts), "attention")


def _on_device(q, k, v, starts, window):
    length = q.shape[1]
    if window is not None and length > 2 * (width := _BLOCK * math.ceil(window / _BLOCK)):
        return _folded(q, k, v, starts, width)
    end = -length % _BLOCK
    q, k, v = (jnp.pad(x, ((0, 0), (0, end), (0, 0), (0, 0))) for x in (q, k, v))
    ends = jnp.arange(1, length + end + 1, dtype=jnp.int32)
    starts = jnp.concatenate([starts, jnp.broadcast_to(ends[length:] - 1, (len(q), end))], axis=1)
    return _kernel(q, k, v, starts, ends)[:, :length]


def _folded(q, k, v, starts, width):
    """Attends within chunks of 2 * `width` positions, each with the `width` before it."""
    batch, length, heads, _ = q.shape
    size = 2 * width
    count = math.ceil(length / size)
    positions = jnp.arange(count * size, dtype=jnp.int32)
    rest = jnp.broadcast_to(positions[length:], (batch, count * size - length))
    starts = jnp.concatenate([starts, rest], axis=1).reshape(batch, count, size)
    starts -= (jnp.arange(count, dtype=jnp.int32) * size - width)[None, :, None]
    ends = jnp.arange(width + 1, width + size + 1, dtype=jnp.int32)

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
        return x.reshape(batch, count, size, *x.shape[2:])

    def with_keys_before(x):
        x = chunks(x)
        before = jnp.pad(x[:, :-1, width:], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
        return jnp.concatenate([before, x], axis=2).reshape(batch * count, -1, *x.shape[3:])

    queries = chunks(q).reshape(batch * count, size, heads, -1)
    keys, values = with_keys_before(k), with_keys_before(v)
    out = _kernel(queries, keys, values, starts.reshape(batch * count, size), ends)
    return out.reshape(batch, count * size, heads, -1)[:, :length]


def _kernel(q, k, v, starts, ends, implementation="mosaic_gpu"):
    """Attends from queries to keys starts .. ends - 1 of their row; starts [B, T], ends [T]."""
    from tokamax._src.ops.attention import api, base

    ends = jnp.broadcast_to(ends, starts.shape)
    mask = base.Mask(k_start=starts[:, None], k_end=ends[:, None])
    return api.IMPLEMENTATIONS[implementation](q, k, v, mask=mask)
