"""Causal and windowed attention on TPUs, by JAX's Pallas kernels ("splash").

A static table skips blocks that no query sees, so cost follows the visible pairs.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128  # width of a TPU's registers; block sizes are multiples of it


def splash_attention(q, k, v, segments, window=None, interpret=False, block: int | None = None):
    """Attends from each position to itself and `window` - 1 before it (None: all) in its segment.

    q [B, L, H, D], `scaled`; k, v [B, L, G, D], G dividing H; segments int32 [B, L]
    -> [B, L, H, D]. Rows and heads may be sharded, positions not. interpret: run the kernels on
    any platform, slowly. block: positions of a block, a multiple of 128; None: see `block_size`.
    """
    specs = tuple(jax.typeof(x).sharding.spec for x in (q, k, v, segments))

    def attend(q, k, v, segments):
        length, num_heads = q.shape[1:3]
        side = block or block_size(length)
        padding = -length % side
        q, k, v = (_heads_first(x, padding) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-(2**31))
        sizes = _block_sizes(side, q.shape[-1])
        kernel = _kernel(length + padding, num_heads, window, sizes, interpret)
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
        return jnp.swapaxes(out, 1, 2)[:, :length]

    return jax.shard_map(attend, in_specs=specs, out_specs=specs[0], check_vma=False)(
        q, k, v, segments
    )


def scaled(q):
    """Divides queries [..., D] by sqrt(D), as these kernels take them."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def block_size(length: int) -> int:
    """Returns the positions of a block; never measured, see benchmarks/splash_blocks.py."""
    return 512 if length > 1024 else LANES


def _block_sizes(block: int, width: int) -> splash.BlockSizes:
    """Returns blocks of one size; heads narrower than the lanes lie with positions along them."""
    minor = splash.QKVLayout.SEQ_MINOR if width < LANES else splash.QKVLayout.HEAD_DIM_MINOR
    layouts = dict(q_layout=minor, k_layout=minor, v_layout=minor)
    return splash.BlockSizes(*(block,) * 8, **layouts)


def _kernel(length, num_heads, window, sizes, interpret):
    shape = (length, length)
    if window is None:
        mask = splash.CausalMask(shape)
    else:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def _heads_first(x, padding):
    return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))), 1, 2)
