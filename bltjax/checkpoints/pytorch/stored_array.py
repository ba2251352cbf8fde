"""An array in a weight file, read piece by piece, for all formats."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bltjax.checkpoints.lazy_arrays import BLOCK_BYTES, Index
from bltjax.runtime.plain_files import check_regular, reason


class StoredArray:
    """A lazy array in a file that begins at byte `start`; strides: in elements, default C order.

    Each read maps the file where the piece lies, copies the piece and drops the map. So threads may
    share an array, and what has been read does not stay in memory.
    """

    def __init__(self, path: Path, start: int, shape, dtype, strides=None):
        self.path, self.start = path, start
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        np.broadcast_to(np.zeros((), self.dtype), self.shape)  # ValueError if NumPy cannot hold it
        if strides is None:
            strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        self._steps = [stride * self.dtype.itemsize for stride in strides]  # bytes

    def __getitem__(self, index: Index) -> np.ndarray:
        if any(piece.step not in (None, 1) for piece in index):
            raise ValueError(f"cannot read {index} of {self.path}: slices must have step 1")
        ranges = [range(n)[piece] for piece, n in zip(index, self.shape, strict=True)]
        result = np.empty([len(r) for r in ranges], self.dtype)
        if result.size:
            offset = sum(r.start * step for r, step in zip(ranges, self._steps, strict=True))
            self._fill(result, self.start + offset)
        return result

    def _fill(self, piece: np.ndarray, begin: int) -> None:
        """Reads `piece` from byte `begin` on, mapping at most a block at a time."""
        reach = [(n - 1) * step for n, step in zip(piece.shape, self._steps, strict=True)]
        num_mapped = sum(reach) + self.dtype.itemsize
        if num_mapped > BLOCK_BYTES:
            axis = int(np.argmax(reach))
            half = piece.shape[axis] // 2
            first, second = np.split(piece, [half], axis)
            self._fill(first, begin)
            self._fill(second, begin + half * self._steps[axis])
        else:
            mapped = np.memmap(self.path, np.uint8, "r", begin, (num_mapped,))
            piece[...] = np.ndarray(piece.shape, self.dtype, mapped, 0, self._steps)


class Refused(ValueError):
    """An error whose message needs no more context for the user."""


@contextlib.contextmanager
def parsing(path: Path, kind: str) -> Iterator[None]:
    """Raises ValueError where a file is damaged, which may cause any error in the parsers.

    Nothing but a regular file is opened.
    """
    try:
        check_regular(path)
        yield
    except (FileNotFoundError, Refused):
        raise
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}): make it readable") from error
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole {kind} file ({reason(error)}): download it again"
        ) from error
