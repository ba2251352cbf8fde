"""Counts the FLOPs of a traced program (jaxpr) and of its kernels, which compiled text hides.

The body of a loop counts once for each iteration, or once where the program decides their number; a
conditional counts as its costliest branch. A Pallas kernel counts as its grid times its body,
without the blocks that splash attention skips because they are masked.
"""

import math

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxprs_in_params

SPLASH = "splash"  # beginning of the names of splash attention's kernels
BLOCK_MASK = 1  # number of their operand that is 0 where a block is skipped


class Work:
    """FLOPs of a traced program.

    flops: on all devices together. kernels: FLOPs of one run of each Pallas kernel on one device,
    by (name, shapes of results).
    """

    def __init__(self, closed: ClosedJaxpr):
        self.kernels = {}
        known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self.flops = self._program(closed.jaxpr, known)

    def _program(self, jaxpr, known: dict) -> float:
        """Returns the FLOPs of a jaxpr; known: its constants, by variable."""
        return sum(self._equation(equation, known) for equation in jaxpr.eqns)

    def _equation(self, equation, known) -> float:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            return 2.0 * equation.outvars[0].aval.size * math.prod(shape[d] for d in contracted)
        if name == "pallas_call":
            return self._kernel(equation, known)
        parts = [
            self._program(inner, _passed(equation, inner, known))
            for inner in jaxprs_in_params(params)
        ]
        if name == "cond":
            return max(parts)
        times = {"scan": params.get("length"), "shard_map": getattr(params.get("mesh"), "size", 1)}
        return times.get(name, 1) * sum(parts)

    def _kernel(self, equation, known) -> float:
        params = equation.params
        flops = self._program(params["jaxpr"], {})
        flops *= math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
        if params["cost_estimate"] is not None:
            flops = params["cost_estimate"].flops
        elif params["name"].startswith(SPLASH) and equation.invars[BLOCK_MASK] in known:
            flops *= np.mean(np.asarray(known[equation.invars[BLOCK_MASK]]) > 0)
        shapes = tuple(v.aval.shape for v in equation.outvars)
        self.kernels[params["name"], shapes] = float(flops)
        return float(flops)


def _passed(equation, inner, known) -> dict:
    """Returns the constants among the inputs of an inner program; no loop changes a mask."""
    given = equation.invars[1:] if equation.primitive.name == "cond" else equation.invars
    if len(given) != len(inner.invars):
        return {}
    return {
        b: known[a]
        for a, b in zip(given, inner.invars, strict=True)
        if not isinstance(a, Literal) and a in known and a.aval.shape == b.aval.shape
    }
