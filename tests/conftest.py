"""Eight simulated CPU devices, and a mesh of one of them set for every test."""

# ruff: noqa: E402 (XLA reads its flags when jax is imported)
import atexit
import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile

# Most of a test is compilation, which is faster unoptimised, and with the older emitters of fusions
# where there are still two kinds.
_XLA_FLAGS = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
if importlib.metadata.version("jaxlib") < "0.11":
    _XLA_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given] + [f"{flag}={value}" for flag, value in _XLA_FLAGS.items() if flag not in _given]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # tests look for XLA's warnings
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # in the first process, whose children share it
    _cache = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax
import numpy as np
import pytest
from absl import flags

from bltjax import sharding
from bltjax.config import MeshConfig
from bltjax.costs.topology import CUDA_PLUGINS
from bltjax.ops import platform

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")
jax.config.update("jax_numpy_rank_promotion", "raise")
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask for parsed flags.


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    """The mesh over the first devices; skips the test where there are fewer than it needs."""
    size = int(np.prod([data, fsdp, tensor]))
    if jax.device_count() < size:
        pytest.skip(f"needs {size} devices, {jax.device_count()} here")
    return sharding.make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[:size])


@pytest.fixture(autouse=True)
def one_device_mesh(request):
    """Every test runs on one device unless it sets another mesh, or asks for `no_mesh`."""
    if "no_mesh" in request.fixturenames:
        yield
    else:
        with jax.set_mesh(mesh_of(1, 1, 1)):
            yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Lets go of a file's programs: each holds memory maps, and Linux gives a process 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def no_mesh():
    """For abstract meshes, which cannot replace one of another size."""


@pytest.fixture
def compiling():
    """Everything is compiled, and nothing taken from the cache: for what XLA says meanwhile."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def formulated_for(monkeypatch):
    """`with formulated_for("gpu"):` traces generation as for a device of this kind, on CPUs."""

    @contextlib.contextmanager
    def formulated(device: str):
        jax.clear_caches()
        with monkeypatch.context() as patch:
            patch.setattr(platform, "platform", lambda: device)
            try:
                yield
            finally:
                jax.clear_caches()

    return formulated


@pytest.fixture
def use_mesh():
    """`with use_mesh(data, fsdp, tensor):` runs a block on another mesh of simulated devices."""
    return lambda *sizes: jax.set_mesh(mesh_of(*sizes))


@pytest.fixture(scope="session")
def cuda_plugin():
    """Skips where programs for GPUs cannot be compiled."""
    if not any(map(importlib.util.find_spec, CUDA_PLUGINS)):
        pytest.skip("no CUDA plugin is installed: pip install -e '.[aot]'")
