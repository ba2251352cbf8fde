"""Fingerprints of arrays that are read piece by piece, equal to those of arrays on devices."""

import numpy as np

AT_ONCE = 2**18  # elements, which stay in the caches


class HostFingerprint:
    """The fingerprint of an array (`fingerprints.py`) whose pieces are added in C order."""

    def __init__(self):
        self.value, self._count = 0, 0

    def add(self, piece: np.ndarray):
        """Adds the next elements."""
        bits = np.ascontiguousarray(piece).reshape(-1).view(f"u{piece.dtype.itemsize}")
        for start in range(0, bits.size, AT_ONCE):
            part = bits[start : start + AT_ONCE].astype(np.uint32)
            first = self._count % 2**32
            index = np.arange(first, first + part.size, dtype=np.uint64).astype(np.uint32)
            part ^= _mixed(index)
            self.value = (self.value + int(_mixed(part).sum(dtype=np.uint64))) % 2**32
            self._count += part.size


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mixes bits of uint32 as `fingerprints._mix`, in place."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return x
