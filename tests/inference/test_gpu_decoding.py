"""The loop that writes bytes as it is compiled for a GPU that is not there: launches and copies."""

import math

import jax
import pytest

from bltjax import sharding
from bltjax.config import read_config
from bltjax.costs import programs, topology
from bltjax.costs.hlo_text import arrays, computations
from bltjax.costs.launches import count_launches

pytestmark = pytest.mark.long

LAYERS = 2  # of each of the four stacks
CHANGES = {
    "blt.compute_dtype": "bfloat16",
    "entropy_model.compute_dtype": "bfloat16",
    "entropy_model.transformer.num_layers": LAYERS,
    "blt.local_encoder.num_layers": LAYERS,
    "blt.global_transformer.num_layers": LAYERS,
    "blt.local_decoder.num_layers": LAYERS,
}


@pytest.fixture(scope="module")
def program(cuda_plugin):
    """The traced program's inputs, and the text and the memory of the compiled one."""
    config = read_config("configs/quickstart.py", CHANGES)
    _, devices = topology.topology_devices("h100:1x1x1")
    with jax.set_mesh(sharding.make_mesh(config.mesh, devices)):
        made = programs.trace(config, "blt", "decode")
        compiled = made.traced.lower().compile()
    return made.traced.jaxpr.in_avals, compiled.as_text(), compiled.memory_analysis()


def test_a_byte_and_a_patch_are_few_launches(program):
    """Of a layer: norm, QKV, write, scores, softmax, values, output, and three of feed-forward.

    Before, 17 of a layer of bytes, and of the global stack a loop in each.
    """
    _, text, _ = program
    layers = 4 * LAYERS
    assert count_launches(text).total <= 13 * layers + 7 * LAYERS + 60


def test_the_host_waits_for_the_end_of_a_byte_and_for_a_patch_alone(program):
    _, text, _ = program
    instructions = [ins for _, _, body in computations(text) for ins in body.values()]
    loops = [ins for ins in instructions if ins.opcode == "while"]
    assert len([ins for ins in loops if "known_trip_count" not in ins.text]) == 1
    assert len([ins for ins in instructions if ins.opcode == "conditional"]) == 1


def test_neither_weights_nor_caches_are_copied(program):
    inputs, text, memory = program
    large = {x.size for x in inputs if x.size >= 2**14}
    assert len(large) > 5
    instructions = [ins for _, _, body in computations(text) for ins in body.values()]
    copies = [ins for ins in instructions if ins.opcode.removesuffix("-start") == "copy"]
    copied = {math.prod(array.sizes) for ins in copies for array in arrays(ins.shape)}
    assert not copied & large
    assert memory.temp_size_in_bytes < max(x.size * x.dtype.itemsize for x in inputs) / 4
