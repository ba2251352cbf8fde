"""The training step as it is compiled for a GPU that is not there: what it adds up, and copies."""

import jax
import pytest

from bltjax import sharding
from bltjax.config import read_config
from bltjax.costs import programs, topology
from bltjax.costs.hlo_text import arrays, computations

pytestmark = pytest.mark.long

TABLES = "f32[6,32768,64]"


@pytest.fixture(scope="module")
def instructions(cuda_plugin):
    """All of the step of a small model in bfloat16 with sparse updates of its tables."""
    optimizer = "blt_training.optimizer.hash_updates"
    changes = {"blt.compute_dtype": "bfloat16", optimizer: "touched", "blt.remat": "full"}
    config = read_config("configs/quickstart.py", changes)
    _, devices = topology.topology_devices("h100:1x1x1")
    with jax.set_mesh(sharding.make_mesh(config.mesh, devices)):
        compiled = programs.trace(config, "blt", "train").traced.lower().compile()
    found = computations(compiled.as_text())
    return [ins for _, _, body in found for ins in body.values()]


def test_sums_over_patches_are_no_scatters(instructions):
    """Scatters are of whole numbers, of maxima, or into float32 tables; those may add."""
    scatters = [ins for ins in instructions if ins.opcode == "scatter"]
    assert scatters
    for ins in scatters:
        (result,) = arrays(ins.shape)
        table = result.kind == "f32" and len(result.sizes) == 2
        assert table or result.kind == "s32" or "scatter-max" in ins.op_name, ins


def test_tables_are_not_copied(instructions):
    """Neither the hash tables nor their moments: a step writes the rows that it touches."""
    assert any(ins.opcode == "parameter" and TABLES in ins.shape for ins in instructions)
    flat = TABLES.replace("6,32768", str(6 * 32768))
    copies = [ins for ins in instructions if ins.opcode.removesuffix("-start") == "copy"]
    assert not [ins for ins in copies if TABLES in ins.shape or flat in ins.shape]
