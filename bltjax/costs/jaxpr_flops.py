"""FLOPs of a traced program (jaxpr), and what compiled text does not tell: those of its kernels.

A loop counts as often as it runs, once where the program decides that, of a conditional the
costliest branch. A Pallas kernel is its grid times its body; splash attention skips blocks of its
grid that the mask leaves nothing of, and those are left out.
"""

import math

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxprs_in_params

SPLASH = "splash"  # how the kernels of splash attention are called
BLOCK_MASK = 1  # their operand that is 0 where a block is skipped


class Work:
    """flops: on all devices together. kernels: FLOPs of a run on one device, by (name, shapes of
    results)."""

    def __init__(self, closed: ClosedJaxpr):
        self.kernels = {}
        known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self.flops = self._program(closed.jaxpr, known)

    def _program(self, jaxpr, known: dict) -> float:
        """known: constants, by variable."""
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
    """The constants among the inputs of an inner program; masks are never what a loop changes."""
    given = equation.invars[1:] if equation.primitive.name == "cond" else equation.invars
    if len(given) != len(inner.invars):
        return {}
    return {
        b: known[a]
        for a, b in zip(given, inner.invars, strict=True)
        if not isinstance(a, Literal) and a in known and a.aval.shape == b.aval.shape
    }
