"""Bytes that the training step of a stage takes on each chip, counted from types."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

from bltjax import sharding
from bltjax.config import PatchingConfig, RunConfig, TokenModelConfig
from bltjax.costs.chips import CHIPS, GIB
from bltjax.costs.topology import EXAMPLES
from bltjax.patching.boundaries import rule_of
from bltjax.patching.calibrate import row_bytes_for, row_patches_for
from bltjax.training.optimizer import learning, make_optimizer
from bltjax.training.state import abstract_state
from bltjax.training.step import make_train_step

HBM_GIB = {name: CHIPS[name].hbm_bytes // GIB for name in EXAMPLES}
PATCH_BYTES = 4.5  # where the config leaves the mean patch to the text


class Array(NamedTuple):
    """An array of a step, as one chip holds it."""

    shape: tuple[int, ...]
    dtype: str
    spec: str
    chip_bytes: int


class MemoryPlan(NamedTuple):
    """Bytes that a training step takes on each chip."""

    parameters: int
    gradients: int
    optimizer: int
    batch: int
    largest: Array  # activation

    @property
    def total(self) -> int:
        return sum(self[:4]) + self.largest.chip_bytes


def plan_stage(config: RunConfig, stage: str, mesh: jax.sharding.AbstractMesh) -> MemoryPlan:
    """Traces the training step of a stage on an abstract mesh and counts its bytes."""
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
        # Within a look-up, tables have the type of a chip's share of them.
        sizes = {size for leaf in leaves for size in (leaf.size, share(leaf))}
        arrays = (a for a in arrays_of(traced.jaxpr.jaxpr) if a.size not in sizes)
        largest = max(arrays, key=array_bytes)
    return MemoryPlan(
        parameters=parameters,
        gradients=chip_bytes(learning(training.optimizer, state.params)),
        optimizer=chip_bytes(state.opt_state),
        batch=chip_bytes(batch),
        largest=Array(
            largest.shape, str(largest.dtype), str(largest.sharding.spec), array_bytes(largest)
        ),
    )


def byte_lengths(model) -> np.ndarray | None:
    """Returns lengths of tokens, any that a token model's step accepts; None for other models."""
    return np.ones(model.vocab_size, np.int32) if isinstance(model, TokenModelConfig) else None


def mean_patch_bytes(patching: PatchingConfig) -> float:
    """Returns the mean patch as far as it is known before any text is."""
    fixed_mean = rule_of(patching).fixed_mean
    return fixed_mean(patching) if fixed_mean else patching.target_patch_bytes or PATCH_BYTES


def abstract_batch(config: RunConfig, stage: str) -> dict:
    """Returns the types of a batch of a stage, on the mesh that is set."""
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


def arrays_of(jaxpr) -> Iterator:
    """Yields the types of all arrays that a program computes, those of inner programs included.

    The inside of a look-up is left out: the compiler may lay it out as it likes.
    """
    for equation in jaxpr.eqns:
        types = [v.aval for v in equation.outvars if getattr(v.aval, "shape", None) is not None]
        yield from (t for t in types if AxisType.Auto not in t.sharding.mesh.axis_types)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def chip_bytes(tree) -> int:
    """Returns the bytes of a pytree of types on one chip."""
    return sum(array_bytes(leaf) for leaf in jax.tree.leaves(tree))


def array_bytes(x) -> int:
    """Returns the bytes on one chip of an array of this type."""
    return share(x) * x.dtype.itemsize


def share(x) -> int:
    """Returns the number of entries on one chip of an array of this type."""
    # Scalars come out of eval_shape without one; inside a look-up arrays are a chip's own.
    if x.sharding is None or AxisType.Manual in x.sharding.mesh.axis_types:
        return x.size
    return math.prod(x.sharding.shard_shape(x.shape))


def print_plan(stage: str, plan: MemoryPlan, seconds: float):
    """Prints a plan, and the chips whose memory holds it."""
    print(f"{stage}: checked in {seconds:.1f} s; a chip holds")
    for name in ("parameters", "gradients", "optimizer", "batch"):
        print(f"  {name:18} {getattr(plan, name) / GIB:8.3f} GiB")
    of = f"{plan.largest.dtype}{list(plan.largest.shape)} {plan.largest.spec}"
    print(f"  {'largest activation':18} {plan.largest.chip_bytes / GIB:8.3f} GiB   {of}")
    fits = [f"{name} ({size})" for name, size in HBM_GIB.items() if plan.total < size * GIB]
    where = f"within the memory (GiB) of {', '.join(fits)}" if fits else "more than any chip has"
    print(f"  {'together':18} {plan.total / GIB:8.3f} GiB   {where}")
