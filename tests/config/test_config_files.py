"""Every file in configs/ is a run that can start, and its docstring tells the truth."""

import ast
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from bltjax import sharding
from bltjax.config import read_config
from bltjax.costs import flops
from bltjax.model import functional
from bltjax.patching.buffers import buffers_from_lengths

DIRECTORY = pathlib.Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.py"))
FULL_SIZE = [name for name in NAMES if name.startswith("blt_")]


def load(name):
    """(docstring, RunConfig) of a file."""
    path = DIRECTORY / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text())), read_config(path)


def models(config):
    """(model config, its training stage) of the models that a run trains."""
    if "token_model" in config.stages:
        return [(config.token_model, config.token_training)]
    found = [(config.entropy_model, config.entropy_training)]
    return found + ([(config.blt, config.blt_training)] if "blt" in config.stages else [])


def test_the_sizes_of_the_paper_are_here():
    assert {"blt_400m", "blt_1b", "blt_2b", "blt_4b", "blt_7b", "blt_8b", "entropy_100m"} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_the_command(name):
    doc, _ = load(name)
    assert f"python -m bltjax.train --config=configs/{name}.py --workdir=" in doc
    assert "Hardware:" in doc


@pytest.mark.parametrize("name", NAMES)
def test_stated_parameters_are_counted(name):
    doc, config = load(name)
    stated = {int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters", doc)}
    reports = [flops.parameter_report(m, functional.abstract_params(m)) for m, _ in models(config)]
    counted = {report[total] for report in reports for total in ("total", "without_hash_tables")}
    assert stated <= counted
    if name in [*FULL_SIZE, "entropy_100m"]:
        assert stated == counted


@pytest.mark.parametrize("name", NAMES)
def test_stated_flops_are_computed(name):
    doc, config = load(name)
    found = re.findall(
        r"(\S+) FLOPs per byte forward at ([\d,]+)-byte rows"
        r"(?: and (\S+) bytes a patch)?",
        doc,
    )
    assert found or name not in [*FULL_SIZE, "entropy_100m"]
    for stated, row, patch in found:
        model = config.blt if patch else config.entropy_model
        total = flops.flops_per_byte(model, int(row.replace(",", "")), float(patch or 1))["total"]
        assert f"{float(stated):.2e}" == f"{total:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_stated_bytes_a_step(name):
    doc, config = load(name)
    _, stage = models(config)[-1]
    for stated in re.findall(r"([\d,]{5,}) bytes a step", doc):
        assert int(stated.replace(",", "")) == stage.batch_size * stage.row_bytes


@pytest.mark.parametrize("name", NAMES)
def test_forward_traces_at_full_size(name):
    """On one device and on twice the smallest number of devices that its mesh takes."""
    _, config = load(name)
    trace(config)
    sizes = [size if size > 0 else 2 for size in dataclasses.astuple(config.mesh)[:3]]
    mesh = AbstractMesh(tuple(sizes), sharding.MESH_AXES, axis_types=(AxisType.Explicit,) * 3)
    no_mesh = AbstractMesh((), ())  # a mesh is changed for one of another size by way of none
    with jax.sharding.use_abstract_mesh(no_mesh), jax.sharding.use_abstract_mesh(mesh):
        trace(config)


def trace(config):
    for model, stage in models(config):
        shape = stage.batch_size, stage.row_bytes
        inputs = []
        if model is config.blt:
            patches = stage.row_patches or int(stage.row_bytes / 4.5)
            inputs = [jax.ShapeDtypeStruct((stage.batch_size, patches), jnp.int32)]

        def forward(params, tokens, *lengths, model=model, num_bytes=stage.row_bytes):
            patches = [buffers_from_lengths(x, num_bytes) for x in lengths]
            return functional.apply(model, params, tokens, *patches)

        logits = jax.eval_shape(
            forward,
            functional.abstract_params(model),
            jax.ShapeDtypeStruct(shape, jnp.int32),
            *inputs,
        )
        assert logits.shape == (*shape, model.vocab_size)
        assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", FULL_SIZE)
def test_batches_fit_the_planned_chips(name):
    """Every stage of a run has a row for each of the chips that its docstring names."""
    doc, config = load(name)
    chips = int(re.search(r"meant for (\d+) ", doc)[1])
    shards = chips // config.mesh.tensor
    assert chips % (config.mesh.fsdp * config.mesh.tensor) == 0
    for stage in (config.entropy_training, config.blt_training, config.evaluation):
        parts = getattr(stage, "accumulation_steps", 1)
        assert stage.batch_size % (shards * parts) == 0


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_runs_share_the_entropy_model(name):
    """The settings are repeated in each file, since a file loaded by path imports no neighbour."""
    alone, run = load("entropy_100m")[1], load(name)[1]
    assert run.entropy_model == alone.entropy_model
    assert run.entropy_training == alone.entropy_training


def test_the_7b_run_is_the_8b_model_with_the_released_recipe():
    released, paper = load("blt_7b")[1], load("blt_8b")[1]
    assert released.blt == paper.blt
    assert (released.patching.rule, released.patching.reset_at_newlines) == ("entropy", False)
    assert released.patching.target_patch_bytes is None
    assert released.patching.threshold == 1.335442066192627
    assert (paper.patching.rule, paper.patching.reset_at_newlines) == ("monotonic", True)
    assert released.blt_training.optimizer == dataclasses.replace(
        paper.blt_training.optimizer, min_ratio=0.01
    )
