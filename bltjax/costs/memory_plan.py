"""Bytes that the training step of a stage takes on each chip, counted from types."""

import math
from typing import NamedTuple

import numpy as np

from bltjax.costs.chips import CHIPS, GIB
from bltjax.costs.topology import EXAMPLES
from bltjax.patching.boundaries import rule_of

HBM_GIB = {name: CHIPS[name].hbm_bytes // GIB for name in EXAMPLES}
PATCH_BYTES = 4.5  # where the config leaves the mean patch to the text


class Array(NamedTuple):
    """An array of a step, as one chip holds it."""

    shape: tuple[int, ...]
    dtype: str
    spec: str
    chip_bytes: int


class Plan(NamedTuple):
    """Bytes on each chip."""

    parameters: int
    gradients: int
    optimizer: int
    batch: int
    largest: Array  # activation

    @property
    def total(self) -> int:
        return sum(self[:4]) + self.largest.chip_bytes


def plan_stage(config, stage: str, mesh) -> Plan:
    """The plan of a stage of a RunConfig that trains, on an abstract mesh."""
    import jax

    from bltjax.training.optimizer import make_optimizer
    from bltjax.training.state import abstract_state
    from bltjax.training.step import make_train_step

    model, training = config.trained(stage)
    no_mesh = jax.sharding.AbstractMesh((), ())  # a mesh is changed for another by way of none
    with jax.sharding.use_abstract_mesh(no_mesh), jax.sharding.use_abstract_mesh(mesh):
        optimizer = make_optimizer(training.optimizer, training.steps)
        state = abstract_state(model, optimizer)
        batch = abstract_batch(config, stage)
        step = make_train_step(model, training, optimizer, byte_lengths=byte_lengths(model))
        traced = step.trace(state, batch)
        parameters = chip_bytes(state.params)
        leaves = jax.tree.leaves((state.params, state.opt_state))
        # A look-up has its chip's share of a table for a type.
        sizes = {size for leaf in leaves for size in (leaf.size, share(leaf))}
        arrays = (a for a in arrays_of(traced.jaxpr.jaxpr) if a.size not in sizes)
        largest = max(arrays, key=array_bytes)
    return Plan(
        parameters=parameters,
        gradients=parameters,
        optimizer=chip_bytes(state.opt_state),
        batch=chip_bytes(batch),
        largest=Array(
            largest.shape, str(largest.dtype), str(largest.sharding.spec), array_bytes(largest)
        ),
    )


def byte_lengths(model):
    """Returns some byte lengths for a step of a token model, any will do; None for others."""
    from bltjax.config import TokenModelConfig

    return np.ones(model.vocab_size, np.int32) if isinstance(model, TokenModelConfig) else None


def mean_patch_bytes(patching) -> float:
    """Returns the mean patch of a PatchingConfig as far as it is known before any text is."""
    fixed_mean = rule_of(patching).fixed_mean
    return fixed_mean(patching) if fixed_mean else patching.target_patch_bytes or PATCH_BYTES


def abstract_batch(config, stage: str) -> dict:
    """Shapes of a batch of a stage, on the mesh that is set."""
    import jax
    import jax.numpy as jnp

    from bltjax import sharding
    from bltjax.patching.calibrate import row_bytes_for, row_patches_for

    _, training = config.trained(stage)
    mean = mean_patch_bytes(config.patching)
    row_bytes = training.row_bytes or row_bytes_for(training.row_patches, mean)
    shape = training.batch_size, row_bytes
    names = "tokens", "targets", "document_ids"
    shapes = dict.fromkeys(names, (shape, jnp.int32)) | dict(loss_mask=(shape, jnp.bool))
    if stage == "blt":
        patches = training.row_patches or row_patches_for(row_bytes, mean)
        shapes["patch_lengths"] = (training.batch_size, patches), jnp.int32
    mesh = jax.sharding.get_abstract_mesh()
    placed = jax.NamedSharding(mesh, sharding.batch_spec(2))
    return {k: jax.ShapeDtypeStruct(s, d, sharding=placed) for k, (s, d) in shapes.items()}


def arrays_of(jaxpr):
    """Types of everything that a program computes, inner programs (loops, ...) included.

    Left out is what the compiler may lay out as it likes: the inside of a look-up.
    """
    from jax.extend.core import jaxprs_in_params
    from jax.sharding import AxisType

    for equation in jaxpr.eqns:
        types = [v.aval for v in equation.outvars if getattr(v.aval, "shape", None) is not None]
        yield from (t for t in types if AxisType.Auto not in t.sharding.mesh.axis_types)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def chip_bytes(tree) -> int:
    """Bytes of a pytree of types on one chip."""
    import jax

    return sum(array_bytes(leaf) for leaf in jax.tree.leaves(tree))


def array_bytes(x) -> int:
    """Bytes of an array on one chip, of its type."""
    return share(x) * x.dtype.itemsize


def share(x) -> int:
    """Entries of an array on one chip, of its type."""
    from jax.sharding import AxisType

    # Scalars come out of eval_shape without one; inside a look-up arrays are a chip's own.
    if x.sharding is None or AxisType.Manual in x.sharding.mesh.axis_types:
        return x.size
    return math.prod(x.sharding.shard_shape(x.shape))


def print_plan(stage: str, plan: Plan, seconds: float):
    print(f"{stage}: checked in {seconds:.1f} s; a chip holds")
    for name in ("parameters", "gradients", "optimizer", "batch"):
        print(f"  {name:18} {getattr(plan, name) / GIB:8.3f} GiB")
    of = f"{plan.largest.dtype}{list(plan.largest.shape)} {plan.largest.spec}"
    print(f"  {'largest activation':18} {plan.largest.chip_bytes / GIB:8.3f} GiB   {of}")
    fits = [f"{name} ({size})" for name, size in HBM_GIB.items() if plan.total < size * GIB]
    where = f"within the memory (GiB) of {', '.join(fits)}" if fits else "more than any chip has"
    print(f"  {'together':18} {plan.total / GIB:8.3f} GiB   {where}")
