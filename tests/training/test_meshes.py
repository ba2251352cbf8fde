"""Twenty steps of the quickstart's model on five meshes of eight devices."""

import functools
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from bltjax import sharding
from bltjax.config import MeshConfig, PatchingConfig, RunConfig, from_config_dict
from bltjax.data.batches.lanes import Layout
from bltjax.data.batches.loader import as_batch, batches
from bltjax.data.batches.order import Shuffled
from bltjax.data.sources.units import Document
from bltjax.model import functional
from bltjax.training.optimizer import make_optimizer
from bltjax.training.state import start_state
from bltjax.training.step import make_train_step

pytestmark = pytest.mark.long  # one interpreter will do

ROOT = Path(__file__).parents[2]
MESHES = [
    *(
        pytest.param(m, marks=pytest.mark.slow)
        for m in [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 2, 4)]
    ),
    (2, 2, 2),
]
STEPS, ROWS = 20, 8
# (rows of a hash table, bytes of a row, patches): tables and rows cost the most time and show the
# least, so that the quickstart's own are for a slow test.
SMALL, WHOLE = (1016, 96, 30), (32_768, 1024, 320)

# Of each weight [out, in] by name, which axis its two dimensions are split over.
FSDP, TENSOR = "fsdp", "tensor"
MATRICES = {
    "wq": (TENSOR, FSDP),
    "wk": (TENSOR, FSDP),
    "wv": (TENSOR, FSDP),
    "wo": (FSDP, TENSOR),
    "w1": (TENSOR, FSDP),
    "w3": (TENSOR, FSDP),
    "w2": (FSDP, TENSOR),
    "output": (None, FSDP),
    "patch_embedding_projection": (None, FSDP),
    "token_embedding_projection": (None, FSDP),
    "encoder_hash_tok_embedding": (("data", FSDP), TENSOR),
    "tok_embeddings": (None, None),
}


@functools.cache
def quickstart(hash_rows) -> RunConfig:
    settings = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    settings.blt_training.batch_size = ROWS
    settings.blt.hash.vocab = hash_rows
    optimizer = settings.blt_training.optimizer
    optimizer.hash_updates = "dense"  # touched rows are for one device
    optimizer.warmup_steps = 5  # of twenty
    return from_config_dict(RunConfig, settings)


@functools.cache
def host_batches(row_bytes, row_patches):
    files = sorted((ROOT / "bltjax").rglob("*.py"))
    documents = Shuffled([[Document(f.name, f.read_bytes()) for f in files]], 0)
    layout = Layout(row_bytes, row_patches, PatchingConfig(rule="space"))
    stream = batches(documents, layout, ROWS)
    found = [as_batch(next(stream)[0]) for _ in range(STEPS)]
    stream.close()
    return found


@functools.cache
def trained(sizes, scale):
    """(losses, state, compilations) after the steps on a mesh."""
    hash_rows, *row = scale
    config = quickstart(hash_rows)
    optimizer = make_optimizer(config.blt_training.optimizer, config.blt_training.steps)
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: jax.device_put(rng.normal(0, 0.1, x.shape).astype(np.float32), x.sharding),
            sharding.concrete(functional.abstract_params(config.blt)),
        )
        state = start_state(params, optimizer)
        step = make_train_step(config.blt, config.blt_training, optimizer)
        losses = []
        for batch in host_batches(*row):
            state, metrics = step(state, sharding.put_batch(batch))
            losses.append(float(metrics["loss"]))
    return losses, state, step._cache_size()


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(
    "scale", [SMALL, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["small", "whole"]
)
def test_twenty_steps_of_the_quickstart(sizes, scale, compiling, capfd):
    expected, _, _ = trained((1, 1, 1), scale)
    capfd.readouterr()
    losses, state, compilations = trained(sizes, scale)
    assert "full rematerialization" not in capfd.readouterr().err
    assert compilations == 1
    assert expected[-1] < expected[0] - 0.2  # it learns
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)
    check_shards(state, dict(zip(sharding.MESH_AXES, sizes, strict=True)))


def check_shards(state, sizes):
    """Every parameter and every moment lies on the devices as its rule says."""
    checked = set()
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
    for tree in (state.params, adam.mu, adam.nu):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            name = path[-2].key  # of the layer; the last one is "weight"
            rule = () if "norm" in name else MATRICES[name]
            split = (None,) * (x.ndim - len(rule)) + rule
            shape = tuple(n // chips(axis, sizes) for n, axis in zip(x.shape, split, strict=True))
            assert {s.data.shape for s in x.addressable_shards} == {shape}, (path, x.shape)
            checked.add(name)
    assert set(MATRICES) <= checked


def chips(axes, sizes):
    """Over how many chips one axis, several, or none split a dimension."""
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([sizes[axis] for axis in axes]))


def is_adam(x):
    return hasattr(x, "mu")
