"""Sums the cycles that the compiler of TPUs expects its own program to take.

libtpu writes an estimate beside most of the instructions it schedules. A loop's body counts once for
each of its rounds, as in `hlo_cost`. Kernels, gathers, scatters, sorts and collectives have no
estimate, so a sum is a lower bound; they are listed as not counted. Copies that run beside the
computation, from HBM to VMEM and back, are neither.
"""

import collections
import dataclasses
import re

from bltjax.costs import hlo_cost, hlo_text

NO_SOURCE = "no source"  # instructions that the compiler added, copies for the most part
_UNCOUNTED = ("gather", "scatter", "sort", "reshape", "reduce-window", *hlo_cost.COLLECTIVES)


@dataclasses.dataclass
class Cycles:
    """Cycles of a program on one device; keys of parts: files below bltjax/, or NO_SOURCE."""

    parts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    uncounted: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def add(self, other: "Cycles", times: int):
        """Adds what runs `times` times."""
        for mine, added in ((self.parts, other.parts), (self.uncounted, other.uncounted)):
            mine.update({name: times * count for name, count in added.items()})


def read_cycles(text: str) -> Cycles:
    """Returns the cycles of a program, given as `compiled.as_text()`; none but libtpu writes any."""
    program = hlo_cost.Program(text, {})
    return _cycles_of(program, program.entry)


def report(text: str, model_flops: float, chip) -> dict | None:
    """Returns cycles as seconds of a `chips.Chip`, and MFU with them; None where there are none."""
    cycles = read_cycles(text)
    if not cycles.total or chip.clock is None:
        return None
    seconds = cycles.total / chip.clock
    return dict(
        cycles=cycles.total,
        seconds=seconds,
        mfu=model_flops / chip.flops / seconds,
        part_seconds={name: count / chip.clock for name, count in cycles.parts.most_common()},
        not_counted=dict(cycles.uncounted.most_common()),
    )


def _cycles_of(program: hlo_cost.Program, name: str) -> Cycles:
    found, body = Cycles(), program.computations[name]
    for ins in body.values():
        cycles = ins.attribute(r'"estimated_cycles":"(\d+)"')
        if ins.opcode == "while":
            rounds = program.rounds(body, ins)
            inside = _cycles_of(program, ins.attribute(hlo_cost.BODY))
            found.add(inside, 1 if rounds is None else rounds)
        elif ins.opcode == "conditional":
            branches = [_cycles_of(program, name) for name in hlo_cost.branches(ins)]
            found.add(max(branches, key=lambda branch: branch.total, default=Cycles()), 1)
        elif cycles:
            found.parts[_part(program.source(ins))] += int(cycles)
        elif ins.opcode in ("call", "call-start"):
            found.add(_cycles_of(program, ins.attribute(hlo_cost.APPLIED)), 1)
        elif kind := _uncounted(program, ins):
            found.uncounted[kind] += 1
    return found


def _uncounted(program, ins: hlo_text.Instruction) -> str | None:
    """Names what an instruction without an estimate does; None for what takes next to no time."""
    if ins.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in ins.text:
        return "kernel"
    called = ins.attribute(hlo_cost.CALLS)
    inside = {i.opcode for i in program.computations[called].values()} if called else set()
    made = {opcode.removesuffix("-start") for opcode in {ins.opcode} | inside}
    return next((kind for kind in _UNCOUNTED if kind in made), None)


def _part(source: str) -> str:
    """Returns the file of a file:line, from bltjax/ on where it lies there."""
    if not source:
        return NO_SOURCE
    return re.sub(r"^.*/bltjax/", "", source.rpartition(":")[0])
