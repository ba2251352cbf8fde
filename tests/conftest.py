"""Eight simulated CPU devices, and a mesh of one of them set for every test."""

import os

# Read once, when jax is imported. Most of a test is compilation, which is faster unoptimised.
_XLA_FLAGS = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given] + [f"{flag}={value}" for flag, value in _XLA_FLAGS.items() if flag not in _given])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest
from absl import flags

from bltjax import sharding
from bltjax.config import MeshConfig

# RANKPROMO
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask for parsed flags.


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    """The mesh over the first data * fsdp * tensor devices; skips the test where there are fewer."""
    size = int(np.prod([data, fsdp, tensor]))
    if jax.device_count() < size:
        pytest.skip(f"needs {size} devices, {jax.device_count()} here")
    return sharding.make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[:size])


@pytest.fixture(autouse=True)
def one_device_mesh():
    """Every test runs on one device unless it sets another mesh."""
    with jax.set_mesh(mesh_of(1, 1, 1)) as mesh:
        yield mesh


@pytest.fixture
def use_mesh():
    """`with use_mesh(data, fsdp, tensor):` runs a block on another mesh of simulated devices."""
    return lambda *sizes: jax.set_mesh(mesh_of(*sizes))
