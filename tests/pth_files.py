"""Files as torch.save writes them, made by hand: pickles opcode by opcode, in a zip archive."""

import pickle
import zipfile

import numpy as np

from bltjax.checkpoints import lazy_arrays
from tests.weight_files import assert_same

STORAGES = {  # torch's storage: what safetensors calls its dtype
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
}


def plain(value) -> bytes:
    """The opcodes that put a plain value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(kind: str, key: str, numel: int, offset: int, shape, strides) -> bytes:
    """The opcodes that put a tensor on the stack."""
    storage = b"(" + plain("storage") + f"ctorch\n{kind}Storage\n".encode()
    storage += plain(key) + plain("cpu") + plain(numel) + b"tQ"
    view = plain(offset) + plain(tuple(shape)) + plain(tuple(strides))
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89" + hooks + b"tR"


def put_pth(directory, program: bytes, storages=()):
    """Writes `directory`/a.pth, with NumPy arrays as storages 0, 1, ...; returns its path."""
    path = directory / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/byteorder", b"little")
        for i, storage in enumerate(storages):
            archive.writestr(f"a/data/{i}", storage.tobytes())
    return path


def read(tree):
    """The tree with its lazy arrays read."""
    if isinstance(tree, dict):
        return {name: read(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(read, tree))
    return lazy_arrays.read_all(tree) if hasattr(tree, "shape") else tree


def assert_trees_same(tree, expected):
    """Equal to the bit, in dtypes and in the types of what is not a tensor."""
    if isinstance(expected, np.ndarray):
        assert_same(tree, expected)
        return
    assert type(tree) is type(expected)
    if isinstance(expected, dict):
        assert list(tree) == list(expected)
        tree, expected = list(tree.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        for left, right in zip(tree, expected, strict=True):
            assert_trees_same(left, right)
    else:
        assert tree == expected
