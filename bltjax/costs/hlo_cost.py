"""Counts the FLOPs, bytes and collectives of a compiled program from its optimized HLO text.

XLA's own cost analysis counts the body of a loop once, however often it runs, and no FLOPs of
Pallas kernels. Here the body counts once for each iteration, a conditional as its costliest branch,
and a kernel as its grid times its body. A loop whose end the program computes counts once, except
the exchange of hash rows, which counts as often as ordinary text needs. The text is that of one
device, so all figures are per device.

Bytes of HBM are an estimate: all that instructions outside fusions read and write in HBM (TPU
layouts name other memories), with slices and gathers counted by the rows that they take. Padding of
tiles, and caches, are left out.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import numpy as np

from bltjax.costs import hlo_text

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that take no time of their own.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"}
FREE |= {"conditional", "call", "partition-id", "replica-id", "opt-barrier"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # number of the operand that is written
CALLS = r"\bcalls=\{?%?([\w.\-]+)"  # the computation of a fusion
APPLIED = r"\bto_apply=%?([\w.\-]+)"  # of a call
CONDITION = r"\bcondition=%?([\w.\-]+)"
BODY = r"\bbody=%?([\w.\-]+)"  # of a loop
_EXCHANGE = "shard_map/while"  # end of the names of the loops in ops/row_exchange.py
_EXCHANGE_ROUNDS = 3  # measured: rows of 16k bytes of text over 256 owners


class Collective(NamedTuple):
    """An instruction by which devices exchange data."""

    kind: str  # one of COLLECTIVES
    num_bytes: int  # of operands or of results, whichever are more
    group: int  # devices that exchange
    shape: str
    op_name: str  # of the JAX program
    source: str  # file:line

    @property
    def received(self) -> float:
        """Bytes that a device receives, at least."""
        if self.kind == "collective-permute":
            return self.num_bytes
        share = self.num_bytes * (self.group - 1) / self.group
        return 2 * share if self.kind == "all-reduce" else share


@dataclasses.dataclass
class Cost:
    """Cost of a program or of a part of it."""

    flops: float = 0.0  # dots and convolutions
    kernel_flops: float = 0.0  # Pallas
    hbm_bytes: float = 0.0
    collectives: dict = dataclasses.field(default_factory=dict)  # key: (Collective, times)
    unknown_loops: set = dataclasses.field(default_factory=set)  # file:line; counted once
    unknown_kernels: set = dataclasses.field(default_factory=set)  # names; counted as nothing

    def add(self, other: "Cost", times: float = 1):
        """Adds a part that runs `times` times."""
        self.flops += times * other.flops
        self.kernel_flops += times * other.kernel_flops
        self.hbm_bytes += times * other.hbm_bytes
        for key, (collective, count) in other.collectives.items():
            self.collectives[key] = collective, times * count
        self.unknown_loops |= other.unknown_loops
        self.unknown_kernels |= other.unknown_kernels

    def collective_bytes(self) -> dict[str, int]:
        """Returns the bytes of each kind, see `Collective.num_bytes`."""
        found = dict.fromkeys(COLLECTIVES, 0)
        for collective, times in self.collectives.values():
            found[collective.kind] += times * collective.num_bytes
        return {kind: size for kind, size in found.items() if size}

    def received_bytes(self) -> float:
        return sum(times * c.received for c, times in self.collectives.values())

    def largest_collective(self) -> Collective | None:
        return max(
            (c for c, _ in self.collectives.values()), key=lambda c: c.num_bytes, default=None
        )


def read_cost(text: str, kernels: dict | None = None) -> Cost:
    """Returns the cost of a program, given as `compiled.as_text()`.

    kernels: FLOPs of its Pallas kernels, from `jaxpr_flops.Work`.
    """
    program = Program(text, kernels or {})
    return program.cost_of(program.entry, program.entry)


class Program:
    """A parsed program: its computations by name, each a dict of Instructions."""

    def __init__(self, text: str, kernels: dict):
        self.computations, self.entry, self.kernels = {}, None, kernels
        self.sources = hlo_text.sources(text)
        for name, is_entry, body in hlo_text.computations(text):
            self.computations[name] = body
            self.entry = name if is_entry else self.entry

    def cost_of(self, name: str, scope: str, fused: bool = False) -> Cost:
        """Returns the cost of a computation.

        scope: the computation that runs it; the pieces of a collective within it count as one.
        """
        total, body = Cost(), self.computations[name]
        for ins in body.values():
            called = ins.attribute(CALLS)
            if ins.opcode == "while":
                inside, rounds = ins.attribute(BODY), self.rounds(body, ins)
                total.add(self.cost_of(inside, inside), 1 if rounds is None else rounds)
                if rounds is None:
                    total.unknown_loops.add(self.source(ins) or ins.op_name or ins.name)
            elif ins.opcode == "conditional":
                total.add(self._costliest(ins))
            elif ins.opcode == "fusion" or (ins.opcode.endswith("-start") and called):
                part = self.cost_of(called, scope, fused=True)
                for key, (collective, times) in part.collectives.items():
                    if not collective.op_name:
                        named = dict(op_name=ins.op_name, source=self.source(ins))
                        part.collectives[key] = collective._replace(**named), times
                total.add(part)
            elif ins.opcode in ("call", "call-start"):
                total.add(self.cost_of(ins.attribute(APPLIED), scope, fused))
            elif ins.opcode in ("dot", "convolution"):
                total.flops += self._product_flops(body, ins)
            elif ins.opcode == "custom-call":
                self._add_custom_call(total, body, ins)
            elif ins.opcode.removesuffix("-start") in COLLECTIVES:
                channel = ins.attribute(r"channel_id=(\d+)") or ins.name
                total.collectives[scope, channel] = self._collective(name, body, ins), 1
            if not fused:
                total.hbm_bytes += self._accessed(body, ins, called)
        return total

    def _costliest(self, ins: hlo_text.Instruction) -> Cost:
        costs = {name: self.cost_of(name, name) for name in branches(ins)}
        costliest = max(
            costs.values(),
            key=lambda c: (c.flops + c.kernel_flops, c.received_bytes()),
            default=Cost(),
        )
        for name, cost in costs.items():
            if any("__cudnn$fmha" in x.text for x in self.computations[name].values()):
                # What runs, but for rows with many documents; its FLOPs are those of the other way.
                return dataclasses.replace(cost, flops=costliest.flops)
        return costliest

    def rounds(self, body: dict, ins: hlo_text.Instruction) -> int | None:
        """Returns how often a loop runs, the exchange of hash rows as text needs; None: unknown."""
        times = self._trip_count(body, ins)
        return _EXCHANGE_ROUNDS if times is None and ins.op_name.endswith(_EXCHANGE) else times

    def _trip_count(self, body: dict, ins: hlo_text.Instruction) -> int | None:
        """Returns the number of iterations of a loop; None where it is not a constant."""
        known = ins.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[ins.attribute(CONDITION)]
        compared = hlo_text.root(condition)
        if compared.opcode != "compare" or "direction=LT" not in compared.text:
            return None
        counter, end = compared.operands
        start = self._initial(body, ins, condition[counter])
        end = hlo_text.constant(condition, end)
        return None if start is None or end is None else max(end - start, 0)

    def _initial(self, body, ins, counter: hlo_text.Instruction) -> int | None:
        """Returns the number that a loop counts from; None where it is computed."""
        index, given = counter.attribute(r"index=(\d+)"), body[ins.operands[0]]
        if index is None or given.opcode != "tuple":
            return None
        start = given.operands[int(index)]
        handed_on = body[start].opcode == "get-tuple-element"  # a constant of the loop around it
        return 0 if handed_on else hlo_text.constant(body, start)

    def _product_flops(self, body, ins) -> float:
        """Returns the FLOPs of a matrix product or convolution, two for each multiply-add."""
        left, right = (hlo_text.dimensions(body[name].shape) for name in ins.operands[:2])
        out = hlo_text.dimensions(ins.shape)
        if ins.opcode == "dot":
            contracted = ins.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
            return 2.0 * math.prod(out) * math.prod(left[d] for d in hlo_text.numbers(contracted))
        return _convolution_flops(ins, left, right, out)

    def _add_custom_call(self, total: Cost, body, ins):
        target = ins.attribute(r'custom_call_target="([^"]*)"') or ""
        if target.startswith(("__cublas", "__cudnn$dot")):
            dims = ins.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
            left = hlo_text.dimensions(body[ins.operands[0]].shape)
            out = hlo_text.dimensions(ins.shape)
            contracted = math.prod(left[int(d)] for d in re.findall(r"\d+", dims))
            total.flops += 2.0 * math.prod(out) * contracted
        elif target in ("tpu_custom_call", "__gpu$xla.gpu.triton"):
            name = ins.attribute(r"([^/\"]+)/pallas_call") or ins.name
            shapes = tuple(array.sizes for array in hlo_text.arrays(ins.shape))
            if (name, shapes) in self.kernels:
                total.kernel_flops += self.kernels[name, shapes]
            else:
                total.unknown_kernels.add(name)

    def _collective(self, computation: str, body, ins) -> Collective:
        kind = ins.opcode.removesuffix("-start")
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a fusion of TPUs
        given = sum(hlo_text.num_bytes(body[name].shape) for name in ins.operands)
        result = hlo_text.num_bytes(ins.shape)
        shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", ins.shape)
        if ins.opcode.endswith("-start") and ins.shape.startswith("(") and kind != "all-reduce":
            result -= given  # its tuple has the operands too
        size, group = max(given, result), hlo_text.group_size(ins.text)
        return Collective(kind, size, group, shape, ins.op_name, self.source(ins))

    def source(self, ins: hlo_text.Instruction) -> str:
        """Returns file:line of the program that an instruction is of; empty where none is known."""
        return self.sources.get(ins.attribute(r"stack_frame_id=(\d+)"), "")

    def _accessed(self, body, ins, called) -> float:
        """Returns the bytes of HBM that an instruction outside fusions reads and writes."""
        if ins.opcode.removesuffix("-start") in FREE or ins.opcode.endswith(("-done", "-update")):
            return 0
        if "AllocateBuffer" in ins.text or "ConcatBitcast" in ins.text:
            return 0
        result = hlo_text.hbm_bytes(ins.shape)
        if ins.opcode in _SLICES:
            return 2 * result
        if ins.opcode in _UPDATES:
            return 2 * hlo_text.hbm_bytes(body[ins.operands[_UPDATES[ins.opcode]]].shape)
        given = [hlo_text.hbm_bytes(body[name].shape) for name in ins.operands]
        if ins.opcode.endswith("-start"):
            return sum(given) + max(result - sum(given), 0)
        if ins.opcode == "fusion":
            inside = self.computations[called]
            pairs = zip(hlo_text.parameters(inside), given, strict=True)
            given = [self._read(inside, name, whole) for name, whole in pairs]
            result = self._written(inside, ins.shape)
        return sum(given) + result

    def _read(self, body, name: str, whole: float) -> float:
        """Returns the bytes that a computation reads of one of its parameters, `whole` at most."""
        total = 0
        for user in (ins for ins in body.values() if name in ins.operands):
            is_updated = user.opcode in _UPDATES and user.operands[0] == name
            if user.opcode in _SLICES and user.operands[0] == name:
                total += hlo_text.num_bytes(user.shape)
            elif user.opcode == "bitcast":
                total += self._read(body, user.name, whole)
            elif user.opcode == "fusion":
                inside = self.computations[user.attribute(CALLS)]
                inner = hlo_text.parameters(inside)[user.operands.index(name)]
                total += self._read(inside, inner, whole)
            elif user.opcode != "tuple" and not is_updated:
                return whole
        return min(whole, total)

    def _written(self, body, shape: str) -> float:
        """Returns the bytes of HBM that a computation writes; results it was given cost none."""
        root, results, total = hlo_text.root(body), hlo_text.arrays(shape), 0
        parts = root.operands if root.opcode == "tuple" else [root.name]
        # One that makes several results, such as a variadic reduction, is the writer of each.
        names = [name for name in parts for _ in hlo_text.arrays(body[name].shape)]
        for name, array in zip(names, results, strict=True):
            made, size = body[name], array.hbm_bytes
            while made.opcode == "bitcast":
                made = body[made.operands[0]]
            if made.opcode in _UPDATES:
                update = body[made.operands[_UPDATES[made.opcode]]]
                size = min(size, hlo_text.num_bytes(update.shape))
            total += 0 if made.opcode == "parameter" else size
        return total


def branches(ins: hlo_text.Instruction) -> list[str]:
    """Returns the computations that a conditional chooses from."""
    names = re.findall(r"%([\w.\-]+)", ins.attribute(r"branch_computations=\{([^}]*)\}") or "")
    return names + re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", ins.text)


def _convolution_flops(ins, left, right, out) -> float:
    """Returns the FLOPs of a convolution.

    TPUs multiply batches of matrices by convolutions: along a batch axis one tap meets each input.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", ins.text)
    window = dict(re.findall(r"(\w+)=(\S+)", ins.attribute(r"window=\{([^}]*)\}") or ""))
    taps = 1
    for axis in (c for c in labels[3] if c.isdigit()):
        settings = {name: text.split("x")[int(axis)] for name, text in window.items()}
        taps *= _valid_taps(
            left[labels[1].index(axis)],
            right[labels[2].index(axis)],
            out[labels[3].index(axis)],
            int(settings.get("stride", 1)),
            int(settings.get("pad", "0_0").split("_")[0]),
            int(settings.get("lhs_dilate", 1)),
            int(settings.get("rhs_dilate", 1)),
        )
    rows, columns = out[labels[3].index("b")], out[labels[3].index("f")]
    return 2.0 * rows * columns * right[labels[2].index("i")] * taps


@functools.cache
def _valid_taps(size, kernel, out, stride, pad, dilate, kernel_dilate) -> int:
    """Counts the pairs of an output and a kernel tap that meet an input, along one axis."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilate - pad
    return int(((place >= 0) & (place <= (size - 1) * dilate) & (place % dilate == 0)).sum())
