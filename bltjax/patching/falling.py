"""A threshold that falls as a patch grows, for NumPy and JAX."""

import math

import numpy as np

STEPS_PER_NAT = 4096  # of thresholds: a calibrated one is a multiple of such a step
_MOST = 2**30  # steps; beyond it no patch of int32 positions ever ends, or each one does
_UNROLL = 16  # positions that one turn of a compiled loop walks over


def levels(threshold, lengths):
    """Returns what the entropy must exceed to end patches of `lengths` bytes, float32 nats.

    threshold: a number, or multiples of a step, float32 of JAX, for each length. lengths: int32, at
    least 1. It is threshold / length, rounded down to a step: in steps all arithmetic is that of
    integers, so that NumPy and JAX agree to the bit.
    """
    if hasattr(threshold, "astype"):
        steps = (threshold * STEPS_PER_NAT).clip(-_MOST, _MOST).astype(np.int32)
    else:
        steps = _steps(threshold)
    return (steps // lengths).astype(np.float32) / np.float32(STEPS_PER_NAT)


def in_steps(threshold: float) -> float:
    """Returns the largest multiple of a step that is not above a threshold."""
    return _steps(threshold) / STEPS_PER_NAT


def _steps(threshold: float) -> int:
    return math.floor(max(min(threshold * STEPS_PER_NAT, _MOST), -_MOST))


def opens(threshold, entropies, begins, open_bytes):
    """Returns whether a patch starts after each position, bool [..., S].

    entropies: float32 nats [..., S]. begins: bool [..., S], the first positions of documents, after
    which one starts in any case. open_bytes: int32 [...] or a number, bytes of the patch that is
    open before the first position. threshold: a number, or float32 [..., 1] as `levels` takes it.
    """
    if isinstance(entropies, np.ndarray):
        return _on_host(threshold, entropies, begins, np.asarray(open_bytes))
    return _on_device(threshold, entropies, begins, open_bytes)


def _on_host(threshold, entropies, begins, open_bytes):
    """Walks along each row in Python, where a step costs less than one of NumPy."""
    size = entropies.shape[-1]
    before = np.broadcast_to(open_bytes, entropies.shape[:-1])
    longest = size + int(before.max(initial=0))
    level = levels(threshold, np.arange(1, longest + 1, dtype=np.int32)).tolist()
    known = np.where(begins, np.float32(np.inf), entropies)  # above any threshold
    found = np.zeros(known.shape, bool)
    rows = known.reshape(-1, size), found.reshape(-1, size), before.ravel()
    for row, row_found, length in zip(*rows, strict=True):
        row_found[_ends(row.tolist(), level, int(length))] = True
    return found


def _ends(entropies: list[float], level: list[float], length: int) -> list[int]:
    """Returns the positions after which a patch ends; length: of the one open before them."""
    positions, ends = enumerate(entropies), []
    levels_left = level[length:]
    while True:
        # Each `zip` goes on along the positions where the one before it was left.
        for (position, entropy), limit in zip(positions, levels_left, strict=False):
            if entropy > limit:
                ends.append(position)
                break
        else:
            return ends
        levels_left = level


def _on_device(threshold, entropies, begins, open_bytes):
    from jax import lax  # Here, so that a data worker with NumPy arrays never loads JAX.
    from jax import numpy as jnp

    def step(length, position):
        entropy, new = position
        length = length + 1
        ends = new | (entropy > levels(threshold, length))
        return jnp.where(ends, 0, length), ends

    # Zeros of the entropies, so that the carry is sharded as they are.
    length = jnp.zeros_like(entropies[..., 0], jnp.int32) + open_bytes
    threshold = threshold[..., 0] if hasattr(threshold, "astype") else threshold
    along = (
        jnp.moveaxis(entropies, -1, 0),
        jnp.moveaxis(jnp.broadcast_to(begins, entropies.shape), -1, 0),
    )
    _, found = lax.scan(step, length, along, unroll=_UNROLL)
    return jnp.moveaxis(found, 0, -1)
