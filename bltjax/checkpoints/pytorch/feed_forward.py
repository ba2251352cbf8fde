"""Finds the settings that give feed-forward widths by the published formula (model.md#block)."""

import dataclasses
import math

from bltjax.config import TransformerConfig


def common_widths(stacks: dict[str, TransformerConfig], problems: list[str]) -> tuple[float, int]:
    """Returns (multiplier, multiple_of) with which the formula gives the width of every stack.

    A line is added to `problems` where no pair does.
    """
    widths = [stack.ffn_dim for stack in stacks.values()]
    given = [
        (s.ffn_dim_multiplier, s.ffn_multiple_of) for s in stacks.values() if s.ffn_width is None
    ]
    # The largest multiple leaves the widest choice of multipliers.
    multiple_of = math.gcd(*widths)
    bases = [int(2 * 4 * stack.dim / 3) for stack in stacks.values()]
    low = max((w - multiple_of + 1) / h for w, h in zip(widths, bases, strict=True))
    high = min((w + 1) / h for w, h in zip(widths, bases, strict=True))
    for pair in [*given, (1.0, 256), (1.0, multiple_of), ((low + high) / 2, multiple_of)]:
        if all(_width(stack, *pair) == stack.ffn_dim for stack in stacks.values()):
            return pair
    problems.append(
        f"feed-forward widths {dict(zip(stacks, widths, strict=True))}: the format has one "
        "multiplier and one multiple for all stacks, and none give these"
    )
    return 1.0, 256


def _width(stack: TransformerConfig, multiplier: float, multiple_of: int) -> int:
    return dataclasses.replace(
        stack, ffn_dim_multiplier=multiplier, ffn_multiple_of=multiple_of, ffn_width=None
    ).ffn_dim
