"""Counts what a compiled GPU program launches, from its optimized HLO text.

Each instruction outside fusions is a kernel, a library call or a copy, and takes the GPU some
microseconds to start, however little it does. A loop whose end the program computes, and a
conditional, make the host wait for the GPU in every round. Kernels agree with the list that XLA's
runtime works through (its dump "thunk_sequence"), which has some more copies of a few bytes.
"""

import dataclasses

from bltjax.costs.hlo_cost import APPLIED, BODY, CONDITION, FREE, Program, branches


@dataclasses.dataclass
class Launches:
    """Launches of a program or of a part of it; loops of unknown length count once."""

    kernels: int = 0  # library calls included
    copies: int = 0
    host_syncs: int = 0  # the host waits for a value that decides how to go on
    library_calls: dict = dataclasses.field(default_factory=dict)  # target: times

    def add(self, other: "Launches", times: int = 1):
        """Adds a part that runs `times` times."""
        self.kernels += times * other.kernels
        self.copies += times * other.copies
        self.host_syncs += times * other.host_syncs
        for target, count in other.library_calls.items():
            self.library_calls[target] = self.library_calls.get(target, 0) + times * count

    @property
    def total(self) -> int:
        return self.kernels + self.copies

    @property
    def fused_attention(self) -> bool:
        """True of the branch for rows that cuDNN takes: the other is for those with too much."""
        return any(target.startswith("__cudnn$fmha") for target in self.library_calls)


def count_launches(text: str) -> Launches:
    """Returns the launches of a program, given as `compiled.as_text()`."""
    program = Program(text, {})
    return _launches(program, program.entry)


def launches_of_decoding(text: str) -> dict[str, int]:
    """Returns the launches for a `byte` of each row, and beside them for a `patch`, a global call.

    text: `compiled.as_text()` of the loop that writes bytes.
    """
    program = Program(text, {})
    loops = [ins for ins in program.computations[program.entry].values() if ins.opcode == "while"]
    (loop,) = [ins for ins in loops if not _is_counted(ins)]
    body = loop.attribute(BODY)
    calls = [ins for ins in program.computations[body].values() if ins.opcode == "conditional"]
    patch = sum(max(_launches(program, way).total for way in branches(ins)) for ins in calls)
    return dict(byte=_launches(program, body).total - patch, patch=patch)


def _launches(program: Program, name: str) -> Launches:
    total, body = Launches(), program.computations[name]
    for ins in body.values():
        kind = ins.opcode
        if kind == "while":
            _add_loop(total, program, body, ins)
        elif kind == "conditional":
            ways = [_launches(program, name) for name in branches(ins)]
            total.add(max(ways, key=lambda found: (found.fused_attention, found.total)))
            total.host_syncs += 1
        elif kind == "call":
            total.add(_launches(program, ins.attribute(APPLIED)))
        elif kind in FREE or kind.endswith(("-done", "-update")):
            continue
        elif kind.removesuffix("-start") == "copy":
            total.copies += 1
        else:
            total.kernels += 1
            if kind == "custom-call":
                target = ins.attribute(r'custom_call_target="([^"]*)"') or ins.name
                total.add(Launches(library_calls={target: 1}))
    return total


def _add_loop(total: Launches, program: Program, body: dict, ins):
    rounds = program.rounds(body, ins)
    times = 1 if rounds is None else rounds
    inside, condition = (_launches(program, ins.attribute(part)) for part in (BODY, CONDITION))
    total.add(inside, times)
    if not _is_counted(ins):
        # The runtime evaluates the condition, copies its result to the host and waits for it.
        total.add(condition, times + 1)
        total.host_syncs += times + 1


def _is_counted(loop) -> bool:
    """Tells whether the compiler knows how often a loop runs."""
    return '"known_trip_count"' in loop.text
