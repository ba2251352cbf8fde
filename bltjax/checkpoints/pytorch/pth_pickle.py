"""Reads the pickle in a file of torch.save without running code in it.

A pickle is a program that may call anything importable, so `pickle.Unpickler` is not used. The
interpreter below knows only the opcodes that build plain values and the few names that make up
tensors. It has no import, no attribute look-up and no call of anything outside this file, so a
malicious file has nothing to call.
"""

import dataclasses
import itertools
import pickletools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from bltjax.checkpoints.lazy_arrays import num_bytes
from bltjax.checkpoints.pytorch.stored_array import Refused, StoredArray

MAX_DEPTH = 100  # so that readers of the tree can recurse
MAX_NODES = 2**22  # shared entries can make an endless tree of a small pickle
MAX_REPEATS = 64  # bytes of all tensors to bytes of all storages: views may repeat them, up to this

REMEDY = (
    "a weight file holds tensors only; re-save it with torch.save({'model': model.state_dict()})"
)


_OTHER_DTYPES = {  # what torch.save calls for dtypes that weights cannot have here
    ("torch._utils", "_rebuild_tensor_v3"): "float8 or of unsigned integers",
    ("torch._utils", "_rebuild_qtensor"): "quantized",
    ("torch", "ComplexFloatStorage"): "complex",
    ("torch", "ComplexDoubleStorage"): "complex",
    **{("torch", f"{kind}Storage"): "quantized" for kind in ("QInt8", "QInt32", "QUInt8")},
}


class Entry(NamedTuple):
    """Place of a storage's bytes in the file."""

    start: int
    size: int
    crc: int


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage that tensors are views of. No tuple, since a pickle can make tuples."""

    start: int
    numel: int
    dtype: np.dtype


def read_program(program: bytes, path: Path, storages: Mapping[str, Entry]) -> Any:
    """Returns the object that a pickle in file `path` builds, with lazy arrays for tensors.

    storages: places of the bytes, by key. Raises Refused for what no weight file needs, and any
    Exception for a damaged pickle.
    """
    limit = MAX_REPEATS * sum(entry.size for entry in storages.values())
    return _checked(_Interpreter(path, storages).run(program), path, limit)


def _checked(tree: Any, path: Path, max_bytes: int) -> Any:
    """Returns the tree if it holds only tensors and plain values and is not too deep or large."""
    level, num_nodes, size = [tree], 0, 0
    for _ in range(MAX_DEPTH):
        size += sum(num_bytes(node) for node in level if isinstance(node, StoredArray))
        if size > max_bytes:
            raise Refused(
                f"refused tensors of {size:,} bytes in {path}, whose storages have "
                f"{max_bytes // MAX_REPEATS:,}: views repeat them, save clones of the tensors"
            )
        children = itertools.chain.from_iterable(_children(node, path) for node in level)
        level = list(itertools.islice(children, MAX_NODES))
        num_nodes += len(level)
        if not level:
            return tree
        if num_nodes >= MAX_NODES:
            break
    raise Refused(f"refused the nesting in {path}, which has no end: {REMEDY}")


def _children(node: Any, path: Path):
    if isinstance(node, dict):
        return node.values()
    if isinstance(node, (list, tuple)):
        return node
    if node is None or isinstance(node, (bool, int, float, str, bytes, StoredArray)):
        return ()
    raise Refused(f"refused a {type(node).__name__} outside a tensor in {path}: {REMEDY}")


class _Interpreter:
    """Pickle's machine: a stack, the stacks that were set aside at marks, and the memo."""

    def __init__(self, path: Path, storages: Mapping[str, Entry]):
        self.path, self.storages = path, storages
        self.stack: list = []
        self.outer: list[list] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for opcode, arg, _ in pickletools.genops(program):
            name = opcode.name
            if name in _VALUES:
                self.stack.append(arg)
            elif name in _BUILDERS:
                count, build = _BUILDERS[name]
                made = build(self, *self._take(count))  # changes the stack
                self.stack.append(made)
            elif name == "GLOBAL":
                self.stack.append(self.named(*arg.split(" ", 1)))
            elif name == "MARK":
                self.outer.append(self.stack)
                self.stack = []
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                self.memo[len(self.memo) if arg is None else arg] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[arg])
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise self.refusal(f"opcode {name}")
        (result,) = self.stack
        return result

    def _take(self, count: int) -> list:
        if count in (_MARKED, _AND_BELOW):
            items, self.stack = self.stack, self.outer.pop()
            return [self.stack.pop(), *items] if count == _AND_BELOW else items
        if count > len(self.stack):
            raise ValueError("its pickle takes more than it has made")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def named(self, module: str, name: str) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("its pickle has a malformed global")
        if (module, name) not in _NAMES:
            kind = _OTHER_DTYPES.get((module, name))
            remedy = kind and f"its tensors are {kind}, cast them to float32 or bfloat16 in torch"
            raise self.refusal(f"global {module}.{name}", remedy or REMEDY)
        return _NAMES[module, name]

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, types.FunctionType):  # no other than those in _NAMES
            raise self.refusal(f"call of a {type(function).__name__}")
        return function(self, *args)

    def storage(self, identity: Any) -> _Storage:
        kind, dtype, key, _, numel = identity
        well_formed = isinstance(dtype, np.dtype) and isinstance(key, str) and _are_counts([numel])
        if kind != "storage" or not well_formed:
            raise ValueError("its pickle has a malformed storage")
        if key not in self.storages:
            raise ValueError(f"storage {key!r} is missing")
        entry = self.storages[key]
        if numel * dtype.itemsize > entry.size:
            raise ValueError(f"storage {key!r} has {entry.size} bytes for {numel} of {dtype}")
        return _Storage(entry.start, numel, dtype)

    def refusal(self, what: str, remedy: str = REMEDY) -> Refused:
        printable = "".join(c if c.isprintable() else "?" for c in what)[:200]
        return Refused(f"refused {printable} in {self.path}: {remedy}")


def _are_counts(numbers) -> bool:
    return all(type(n) is int and n >= 0 for n in numbers)


def _tensor(machine, storage, offset, shape, strides, requires_grad, hooks, flags=None):
    if flags:
        raise machine.refusal("a conjugate or negative view")
    if not isinstance(storage, _Storage) or not _are_counts([offset, *shape, *strides]):
        raise ValueError("its pickle has a malformed tensor")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise ValueError(f"a tensor ends at {last} in a storage of {storage.numel}")
    start = storage.start + offset * storage.dtype.itemsize
    # The stride of an axis of length 1 is of no use, and may be too large for NumPy.
    strides = [step if n > 1 else 0 for n, step in zip(shape, strides, strict=True)]
    return StoredArray(machine.path, start, shape, storage.dtype, strides)


def _parameter(machine, tensor, requires_grad, hooks):
    if not isinstance(tensor, StoredArray):
        raise ValueError("its pickle has a malformed parameter")
    return tensor


def _extended(machine, target, *items):
    if not isinstance(target, list):
        raise ValueError("its pickle appends to what is no list")
    target.extend(items)
    return target


def _updated(machine, target, *items):
    keys, values = items[::2], items[1::2]
    if not isinstance(target, dict) or not all(isinstance(key, (str, int)) for key in keys):
        # Keys of other types may take forever to hash, like tuples of tuples.
        raise machine.refusal("an entry of a dict that is not named by a str or an int")
    target.update(zip(keys, values, strict=True))
    return target


def _without_attributes(machine, target, attributes):
    """Drops attributes of an ordered dict: torch adds `_metadata`, versions of modules."""
    if not isinstance(target, OrderedDict):
        raise machine.refusal(f"attributes of a {type(target).__name__}")
    return target


_MARKED, _AND_BELOW = -1, -2  # all entries since the mark; these and the one below

# By opcode: number of stack entries it takes, and the function that makes its result of them.
_BUILDERS: dict[str, tuple[int, Callable]] = {
    "NONE": (0, lambda machine: None),
    "NEWTRUE": (0, lambda machine: True),
    "NEWFALSE": (0, lambda machine: False),
    "EMPTY_TUPLE": (0, lambda machine: ()),
    "TUPLE1": (1, lambda machine, *items: items),
    "TUPLE2": (2, lambda machine, *items: items),
    "TUPLE3": (3, lambda machine, *items: items),
    "TUPLE": (_MARKED, lambda machine, *items: items),
    "EMPTY_LIST": (0, lambda machine: []),
    "APPEND": (2, _extended),
    "APPENDS": (_AND_BELOW, _extended),
    "EMPTY_DICT": (0, lambda machine: {}),
    "SETITEM": (3, _updated),
    "SETITEMS": (_AND_BELOW, _updated),
    "STACK_GLOBAL": (2, _Interpreter.named),
    "REDUCE": (2, _Interpreter.call),
    "BUILD": (2, _without_attributes),
    "BINPERSID": (1, _Interpreter.storage),
}

# Opcodes that push their argument.
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}

_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda machine: OrderedDict(),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "DoubleStorage"): np.dtype(np.float64),
    ("torch", "FloatStorage"): np.dtype(np.float32),
    ("torch", "HalfStorage"): np.dtype(np.float16),
    ("torch", "BFloat16Storage"): np.dtype(ml_dtypes.bfloat16),
    ("torch", "LongStorage"): np.dtype(np.int64),
    ("torch", "IntStorage"): np.dtype(np.int32),
    ("torch", "ShortStorage"): np.dtype(np.int16),
    ("torch", "CharStorage"): np.dtype(np.int8),
    ("torch", "ByteStorage"): np.dtype(np.uint8),
    ("torch", "BoolStorage"): np.dtype(np.bool_),
}
