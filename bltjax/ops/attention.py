"""Self-attention of bytes and of patches, each position to those before it in its document.

No cost is quadratic in the number of bytes: byte stacks attend block by block within a fixed
window. Softmaxes are in float32.

Letters: B rows, L positions, H heads, G key/value heads, D head width.
"""

import jax

from bltjax.ops.kernels.splash_attention import splash_attention
from bltjax.ops.kernels.tiled_attention import tiled_attention


def self_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: int | None = None
) -> jax.Array:
    """Attends from each position to itself and `window` - 1 before it (None: all) in its segment.

    Shapes: q [B, L, H, D]; k, v [B, L, G, D] with G dividing H; segments int32 [B, L]
    -> [B, L, H, D]. With a window, cost is linear in L. See model.md#masks.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device  # None: a mesh of shapes alone
    on_tpu = device is not None and device.platform == "tpu"
    # Elsewhere in tiles, whose sizes suit CPUs.
    return (splash_attention if on_tpu else tiled_attention)(q, k, v, segments, window)
