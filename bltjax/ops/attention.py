"""Self-attention of bytes and of patches, each position to those before it in its document.

No cost is quadratic in the number of bytes: byte stacks attend block by block within a fixed
window. Softmaxes are in float32. Which kernel computes it is chosen once, at trace time, by
`choose_attention`: all give the same values up to rounding.

Letters: B rows, L positions, H heads, G key/value heads, D head width.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bltjax.ops.kernels import cudnn_attention, mosaic_attention
from bltjax.ops.kernels.splash_attention import scaled, splash_attention
from bltjax.ops.kernels.tiled_attention import tiled_attention
from bltjax.ops.kernels.unrolled_attention import unrolled_attention

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q, k, v) -> result
# Compute capabilities by the names of cards: all that is known of a chip that is compiled for.
_CAPABILITIES = {r"\bG?H(?:100|200|800|20)\b": 9.0, r"\bG?B[123]00\b": 10.0}  # Hopper, Blackwell


class Choice(NamedTuple):
    """The kernel of self-attention, and why it is this one."""

    name: str  # "tiles", "cudnn", "mosaic", "splash"
    reason: str


def self_attention(q, k, v, segments, window: int | None = None, setting: str = "auto"):
    """Attends from each position to itself and `window` - 1 before it (None: all) in its segment.

    Shapes: q [B, L, H, D]; k, v [B, L, G, D] with G dividing H; segments int32 [B, L]
    -> [B, L, H, D]. With a window, cost is linear in L. setting: see `choose_attention`. See
    model.md#masks.
    """
    name = choose_attention(setting, q.dtype, q.shape[-1]).name
    q = scaled(q) if name == "splash" else q
    return attention_of_rows(segments, window, name)(q, k, v)


def attention_of_rows(
    segments: jax.Array, window: int | None, name: str, block: int | None = None
) -> Attend:
    """Returns `self_attention` of rows, by the kernel of a `Choice`, for many layers to call.

    What a kernel must know of segments [B, L] is computed here, once. "splash" takes queries that
    are `scaled`, and block: see `splash_attention`.
    """
    if name == "cudnn":
        packed = cudnn_attention.packed_documents(segments)
        attend = functools.partial(cudnn_attention.cudnn_attention, packed=packed)
    elif name == "mosaic":
        starts = mosaic_attention.first_keys(segments, window)
        attend = functools.partial(mosaic_attention.mosaic_attention, starts=starts)
    elif name == "splash":
        attend = functools.partial(splash_attention, block=block)
    else:  # those for CPUs, where no device is known
        attend = unrolled_attention if _device()[0] == "gpu" else tiled_attention
    return lambda q, k, v: attend(q, k, v, segments, window)


def choose_attention(setting: str, dtype, head_width: int) -> Choice:
    """Chooses the kernel for the devices of the mesh that is set.

    setting: "auto", or the name of a kernel. Raises ValueError for one that cannot work there.
    """
    platform, kind = _device()
    if setting == "tiles":
        return Choice("tiles", "as set")
    if setting != "auto":
        problem = platform and _PROBLEMS[setting](platform, kind, jnp.dtype(dtype).name, head_width)
        if problem:
            raise ValueError(f"attention={setting!r} {problem}, or set attention='auto'")
        return Choice(setting, "as set")
    if platform == "tpu":
        return Choice("splash", kind)
    if platform != "gpu":
        return Choice("tiles", f"for {platform or 'no device'}")
    problem = _problem_of_cudnn(platform, kind, jnp.dtype(dtype).name, head_width)
    if problem is None and _capability(kind) >= 11:
        problem = f"is not known to work on {kind}: try attention='cudnn'"
    return Choice("tiles", f"cudnn {problem}") if problem else Choice("cudnn", kind)


def _problem_of_cudnn(platform, kind, dtype, head_width) -> str | None:
    """Returns what is wrong with this kernel there, and the remedy; None where it works."""
    if platform != "gpu" or _capability(kind) < 9:
        return f"needs a GPU of compute capability 9.0 (H100) or later, not {kind}: use one"
    return _problem_of_shapes(cudnn_attention, dtype, head_width)


def _problem_of_mosaic(platform, kind, dtype, head_width) -> str | None:
    if platform != "gpu" or _capability(kind) < 9:
        return f"needs a GPU of compute capability 9.0 (H100) or later, not {kind}: use one"
    if not mosaic_attention.is_installed():
        return "needs tokamax, which is not installed: pip install tokamax"
    return _problem_of_shapes(mosaic_attention, dtype, head_width)


def _problem_of_shapes(kernel, dtype, head_width) -> str | None:
    if dtype not in kernel.DTYPES:
        return f"takes no {dtype}: set compute_dtype='bfloat16'"
    if head_width % 8 or head_width > kernel.MOST_HEAD_WIDTH:
        most = kernel.MOST_HEAD_WIDTH
        return f"takes heads of a multiple of 8 up to {most}, not {head_width}: change num_heads"
    return None


def _problem_of_splash(platform, kind, dtype, head_width) -> str | None:
    return None if platform == "tpu" else f"needs a TPU, not {kind}: use one"


_PROBLEMS = dict(cudnn=_problem_of_cudnn, mosaic=_problem_of_mosaic, splash=_problem_of_splash)


def _device() -> tuple[str | None, str | None]:
    """Returns platform and kind of the devices of the mesh; None for those of shapes alone."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (None, None) if device is None else (device.platform, device.device_kind)


def _capability(kind: str) -> float:
    """Returns the compute capability of GPUs of a kind; 0 where it is not known."""
    for name, capability in _CAPABILITIES.items():
        if re.search(name, kind):
            return capability
    here = [d for d in jax.local_devices() if d.device_kind == kind]
    return float(getattr(here[0], "compute_capability", 0)) if here else 0.0
