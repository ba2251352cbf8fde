"""Parses HLO, the text of a compiled program, into instructions with shapes and sources."""

import math
import re
from typing import NamedTuple

_INSTRUCTION = re.compile(
    r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)", re.DOTALL
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d\w*)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    text: str  # operands and attributes
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a regular expression that is found in the text."""
        found = re.search(pattern, self.text)
        return found and found[1]

    @property
    def op_name(self) -> str:
        """Name in the JAX program; empty for an instruction that XLA added."""
        return self.attribute(r'op_name="([^"]*)"') or ""


class Array(NamedTuple):
    """Type of an array: its dtype, sizes and layout."""

    kind: str  # such as bf16
    sizes: tuple[int, ...]
    layout: str

    @property
    def num_bytes(self) -> int:
        bits = re.search(r"\d+", self.kind)
        each = 0 if self.kind == "token" else int(bits[0]) / 8 if bits else 1
        return int(math.prod(self.sizes) * each)

    @property
    def hbm_bytes(self) -> int:
        """Bytes in HBM: 0 for an array in another memory of a TPU, such as S(1), its VMEM."""
        return 0 if re.search(r"S\([1-9]", self.layout) else self.num_bytes


def computations(text: str):
    """Yields (name, is_entry, {name: Instruction}) for each computation.

    A computation lasts until the next begins: its closing "}" may have attributes, and those of a
    kernel may span several lines, one of which may begin with "}}".
    """
    header, lines = None, []
    for line in text.splitlines():
        found = _COMPUTATION.match(line)
        if found:
            if header:
                yield _computation(header, lines)
            header, lines = found, []
        elif header and _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += "\n" + line
    if header:
        yield _computation(header, lines)


def _computation(header, lines):
    return header[2], bool(header[1]), {i.name: i for i in map(_instruction, lines)}


def _instruction(line: str) -> Instruction:
    root, name, shape, opcode, text = _INSTRUCTION.match(line).groups()
    operands = re.findall(r"%([\w.\-]+)", text.split(")", 1)[0])
    return Instruction(name, shape, opcode, operands, text, bool(root))


def sources(text: str) -> dict[str, str]:
    """Returns file:line of each stack frame, by the frame's id."""
    tables, table = {}, None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            break
        if re.fullmatch(r"[A-Z]\w+", line):
            table = tables.setdefault(line, {})
        elif table is not None and " " in line:
            number, value = line.split(" ", 1)
            table[number] = value
    files, found = tables.get("FileNames", {}), {}
    for number, frame in tables.get("StackFrames", {}).items():
        place = tables["FileLocations"][re.search(r"file_location_id=(\d+)", frame)[1]]
        file = files[re.search(r"file_name_id=(\d+)", place)[1]].strip('"')
        line = re.search(r" line=(\d+)", place)[1]
        found[number] = f"{file}:{line}"
    return found


def parameters(body) -> list[str]:
    """Returns the names of a computation's parameters, in order."""
    found = {int(i.text.split(")")[0]): i.name for i in body.values() if i.opcode == "parameter"}
    return [found[n] for n in sorted(found)]


def root(body) -> Instruction:
    """Returns the instruction whose value is the computation's result."""
    return next(i for i in body.values() if i.is_root)


def constant(body, name: str) -> int | None:
    """Returns the integer that a value is; None where it is computed."""
    ins = body[name]
    while ins.opcode in ("copy", "bitcast"):
        ins = body[ins.operands[0]]
    number = ins.text.split(")", 1)[0]
    return int(number) if ins.opcode == "constant" and re.fullmatch(r"-?\d+", number) else None


def arrays(shape: str) -> list[Array]:
    """Returns the arrays of a shape, which may be a tuple."""
    return [Array(kind, tuple(numbers(sizes)), at) for kind, sizes, at in _ARRAY.findall(shape)]


def dimensions(shape: str) -> tuple[int, ...]:
    return arrays(shape)[0].sizes


def num_bytes(shape: str) -> int:
    return sum(array.num_bytes for array in arrays(shape))


def hbm_bytes(shape: str) -> int:
    return sum(array.hbm_bytes for array in arrays(shape))


def group_size(text: str) -> int:
    """Returns the number of devices in a group of a collective.

    The groups are written as replica_groups={{0,1},{2,3}}, =[2,4]<=[8] or =mesh['a'=2,'b'=4] {'b'}.
    """
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*(?:\([^)]*\)[^{]*)?\{([^}]*)\}", text)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]<=", text)
    if counted:
        return int(counted[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(numbers(listed[1])) if listed else 1


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
