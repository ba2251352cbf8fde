"""Opens GGUF files, whose tensors are dequantized piece by piece, with the library gguf.

It is optional (`pip install 'bltjax[gguf]'`) and imported when a file is opened.
"""

import importlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bltjax.checkpoints.lazy_arrays import Index, LazyArray, insert
from bltjax.checkpoints.pytorch.stored_array import parsing

_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}


def open_gguf(
    path: Path, prefixes: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, LazyArray], list[str]]:
    """Opens a file; returns its metadata, its tensors by name, and problems with these.

    Metadata are numbers, texts and lists, nested by the dots in their names; those without one of
    the prefixes are left out. Tensors have the shapes of PyTorch; quantized ones become float32.
    Raises FileNotFoundError, and ValueError for a damaged file or where the library is missing.
    """
    gguf = _library()
    with parsing(path, "GGUF"):
        reader = gguf.GGUFReader(path)
        metadata: dict[str, Any] = {}
        for name, field in reader.fields.items():
            if name.startswith(prefixes):
                insert(metadata, name.split("."), _value(gguf, field))
        problems, tensors = [], {}
        for tensor in reader.tensors:
            try:
                tensors[str(tensor.name)] = _opened(gguf, tensor)
            except NotImplementedError:
                problems.append(
                    f"{tensor.name} is {tensor.tensor_type.name}, which the library gguf cannot "
                    "dequantize: upgrade it, or take a file of another kind"
                )
    return metadata, tensors, problems


def _library():
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ValueError(
            f"gguf is needed and missing ({error}): pip install 'bltjax[gguf]'"
        ) from error


def _value(gguf, field):
    """Returns the value of a field of metadata."""
    kinds = gguf.GGUFValueType
    parts = [field.parts[i] for i in field.data]
    if field.types[-1] == kinds.STRING:
        values: list = [bytes(part).decode("utf-8", "replace") for part in parts]
    else:
        values = [part[0].item() for part in parts]
    return values if field.types[0] == kinds.ARRAY else values[0]


def _opened(gguf, tensor) -> LazyArray:
    """Returns a tensor as a lazy array. Raises NotImplementedError for unknown quantizations."""
    kind = tensor.tensor_type
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if kind.name == "BF16":
        return _Mapped(tensor.data.view(ml_dtypes.bfloat16).reshape(shape))
    if kind.name in _PLAIN:
        return _Mapped(tensor.data.view(_PLAIN[kind.name]).reshape(shape))
    found = _Quantized(gguf, tensor, shape)
    found[tuple(slice(0, min(n, 1)) for n in shape)]  # whether this kind can be read
    return found


class _Mapped:
    """An array in a memory map."""

    def __init__(self, mapped: np.ndarray):
        self.mapped, self.shape, self.dtype = mapped, mapped.shape, mapped.dtype

    def __getitem__(self, index: Index) -> np.ndarray:
        return np.array(self.mapped[index])


class _Quantized:
    """A quantized array [..., in]; of each row whole blocks are dequantized."""

    def __init__(self, gguf, tensor, shape):
        self._kind, self._raw, self._dequantize = tensor.tensor_type, tensor.data, gguf.dequantize
        self._block, self._bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        self.shape, self.dtype = shape, np.dtype(np.float32)

    def __getitem__(self, index: Index) -> np.ndarray:
        *rows, features = index
        first, last, _ = features.indices(self.shape[-1])
        begin, end = first // self._block, -(-last // self._block)
        raw = self._raw[(*rows, slice(begin * self._bytes, end * self._bytes))]
        values = self._dequantize(np.ascontiguousarray(raw), self._kind)
        start = begin * self._block
        return np.array(values[..., first - start : last - start], np.float32)
