"""Pickles that want more than tensors are refused, and nothing in them runs."""

import os
import pickle
import sys
import time

import numpy as np
import pytest

from bltjax.checkpoints.pytorch.pth_files import open_pth
from tests.pth_files import plain, put_pth, tensor

REDUCED = b"cos\nsystem\n" + plain("true") + b"\x85R"


class Call:
    """What pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def refused(tmp_path, program, match):
    path = put_pth(tmp_path, program, [np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match=match) as raised:
        open_pth(path)
    message = str(raised.value)
    assert "a.pth" in message and message.isprintable() and len(message) < 1000
    return message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "function, name", [(os.system, "system"), (eval, "eval"), (exec, "exec"), (os.mkdir, "mkdir")]
)
@pytest.mark.parametrize("place", [lambda x: x, lambda x: {"model": {"w": [x]}}], ids=["top", "in"])
def test_calls_are_refused_and_not_made(tmp_path, protocol, function, name, place):
    mark = tmp_path / "ran"
    text = {
        "system": f"touch {mark}",
        "eval": f"open({str(mark)!r}, 'w')",
        "exec": f"open({str(mark)!r}, 'w')",
        "mkdir": str(mark),
    }
    program = pickle.dumps(place(Call(function, text[name])), protocol)
    message = refused(tmp_path, program, match=rf"refused (global \w+\.{name}|opcode )")
    if protocol >= 2:
        assert f".{name} in " in message
        assert message.endswith("re-save it with torch.save({'model': model.state_dict()})")
    assert not mark.exists()
    pickle.loads(program)  # which did run it: the mark is a fair one
    assert mark.exists()


def stack_global(module, name):
    return plain(module) + plain(name) + b"\x93"


@pytest.mark.parametrize(
    "module, name",
    [
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("__builtin__", "eval"),
        ("this", "s"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch", "FloatStorage.from_file"),
        ("torch", "FloatStorage.__new__"),
        ("torch", "nn.Linear"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_parameter_with_state"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict.__reduce_ex__"),
        ("collections", "abc.sys.modules"),
        ("collections", "defaultdict"),
        ("collections ", "OrderedDict"),
        ("", "collections OrderedDict"),
        ("Collections", "OrderedDict"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("bltjax.checkpoints.pytorch.pth_pickle", "_tensor"),
        ("copyreg", "_reconstructor"),
        ("os\n\x1b[2J", "system"),
    ],
)
def test_other_names_are_refused(tmp_path, module, name):
    before = set(sys.modules)
    for program in (stack_global(module, name), f"c{module}\n{name}\n".encode()):
        if b"\n\x1b" not in program or program[:1] != b"c":
            refused(tmp_path, b"\x80\x04" + program + b".", match="refused global ")
    assert set(sys.modules) - before == set()


FLOAT = b"ctorch\nFloatStorage\n"
STORAGE = b"(" + plain("storage") + FLOAT + plain("0") + plain("cpu") + plain(3) + b"tQ"
TENSOR = tensor("Float", "0", 3, 0, (3,), (1,))
ORDERED = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
    "program, message",
    [
        (b"(S'true'\nios\nsystem\n.", "opcode"),
        (b"(ios\nsystem\n.", "opcode INST"),
        (b"(cos\nsystem\nX\4\0\0\0trueo.", "global os.system"),
        (b"(" + ORDERED + b"o.", "opcode OBJ"),
        (ORDERED + b")\x81.", "opcode NEWOBJ"),
        (ORDERED + b")}\x92.", "opcode NEWOBJ_EX"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"\x83\x01\x01.", "opcode EXT2"),
        (b"\x84\x01\x01\x01\x01.", "opcode EXT4"),
        (b"Pos.system\n.", "opcode PERSID"),
        (b"\x97.", "opcode NEXT_BUFFER"),
        (b"\x96" + bytes(8) + b".", "opcode BYTEARRAY8"),
        (b"}}X\1\0\0\0aK\1sb.", "attributes of a dict"),
        (b"]}b.", "attributes of a list"),
        (ORDERED + b"}b.", "attributes of a function"),
        (TENSOR + b"}b.", "attributes of a StoredArray"),
        (TENSOR + b")R.", "call of a StoredArray"),
        (FLOAT + b"K\5\x85R.", "call of a"),
        (plain("os.system") + plain(("true",)) + b"R.", "call of a str"),
        (FLOAT + b".", "a Float32DType outside a tensor"),
        (STORAGE + b".", "a _Storage outside a tensor"),
        (ORDERED + b".", "a function outside a tensor"),
        (b"}" + FLOAT + b"K\1s.", "an entry of a dict"),
    ],
    ids=str,
)
def test_other_opcodes_and_uses_are_refused(tmp_path, program, message):
    refused(tmp_path, program, match=f"refused {message}")


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"N",
        b"NN.",
        b"(.",
        b"0.",
        b"t.",
        b"e.",
        b"K\1K\2a.",
        b"K\1\x86.",
        b"}K\1s.",
        b"}(K\1u.",
        b"q\0.",
        b"h\7.",
        b"R.",
        b"Q.",
        b"NQ.",
        b"]Q.",
        b"\x93.",
        b"NN\x93.",
        ORDERED + b"K\1\x85R.",
        ORDERED + b"NR.",
        b"ctorch._utils\n_rebuild_parameter\n" + plain(("w", True, None)) + b"R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n" + plain((None,) * 6) + b"R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0)]\x89NtR.",
        b"X\xff\xff\xff\x7fabc.",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8d" + b"\xff" * 8 + b".",
        b"c\xff\n\xff\n.",
        b"\x80\xff.",
        b"\xff.",
    ],
    ids=str,
)
def test_malformed_pickles_are_refused(tmp_path, program):
    refused(tmp_path, program, match=r"is not a whole torch\.save file|refused")


DEEP_TUPLE = b")" + b"q\0h\0\x86" * 60  # of twice the same, of twice the same, of ...
WIDE_LIST = b"](" * 4 + b"N" * 3000 + b"e" + (b"q\0" + b"h\0" * 3000 + b"e") * 3
DEEP_DICT = b"}(K\1" * 60 + b"N" + b"q\0K\2h\0u" * 60


@pytest.mark.parametrize(
    "program",
    [
        b"]q\0h\0a.",
        b"}q\0K\1h\0s.",
        b"]q\0(" + b"h\0" * 100 + b"e.",
        DEEP_TUPLE + b".",
        DEEP_DICT + b".",
        WIDE_LIST + b".",
        b"}" + DEEP_TUPLE + b"K\1s.",
        DEEP_TUPLE + plain("x") + b"\x93.",
        b"(" + plain("storage") + FLOAT + DEEP_TUPLE + b"NK\0tQ.",
        DEEP_TUPLE + DEEP_TUPLE + b"R.",
        b")" + b"\x85" * 200_000 + b".",
        b"(" * 200_000 + b".",
        b"]" * 200_000 + b"a" * 199_999 + b".",
    ],
    ids=lambda program: str(program[:20]),
)
def test_bombs_do_not_go_off(tmp_path, program):
    """Walking, hashing or comparing these takes for ever, or more stack than there is."""
    start = time.monotonic()
    refused(tmp_path, program, match=r"is not a whole torch\.save file|refused")
    assert time.monotonic() - start < 30


def test_plain_values_pass(tmp_path):
    value = {"a": [1, -1, 2**70, 0.5, True, None, "é", (), (1,), (1, 2), (1, 2, 3, 4)], 7: {}}
    for protocol in (2, 3, 4, 5):
        assert open_pth(put_pth(tmp_path, pickle.dumps(value, protocol))) == value
