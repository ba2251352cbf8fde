"""The compilers know the flags that the scripts set, and libtpu makes gathers asynchronous by them.

An unknown flag ends a process at its start.
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.launching import LAUNCH, ROOT

SCRIPTS = {
    "XLA_FLAGS": ("slurm_gpu.sbatch",),
    "LIBTPU_INIT_ARGS": ("tpu_vm_worker.sh", "gke/jobset.sh"),
}
# A few layers whose weights are spread over 16 chips, and their gradients.
PROGRAM = """
import sys
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

if sys.argv[1] == "XLA_FLAGS":
    sys.exit(not jax.devices())
devices = topologies.get_topology_desc(sys.argv[2], platform="tpu").devices
mesh = Mesh(np.array(devices), ("fsdp",))

def array(*shape, spec):
    return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, P(*spec)))

def loss(weights, x):
    layer = lambda h, w: (h + jax.nn.gelu(h @ w[0]) @ w[1], None)
    return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2).mean()

weights = [array(4, *shape, spec=(None, "fsdp")) for shape in ((1024, 4096), (4096, 1024))]
x = array(4096, 1024, spec=("fsdp",))
print(jax.jit(jax.grad(loss)).lower(weights, x).compile().as_text())
"""


def start(variable, flags, topology="v6e:4x4"):
    """The finished process of a compiler that has been given flags."""
    environ = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", variable: " ".join(flags)}
    command = [sys.executable, "-c", PROGRAM, variable, topology]
    env = {k: v for k, v in os.environ.items() if k not in SCRIPTS} | environ
    pipes = dict(capture_output=True, text=True, timeout=240)
    return subprocess.run(command, env=env, cwd=ROOT, **pipes)


def flags_of(variable):
    """The flags that scripts set; skips the test where their compiler is not installed."""
    if variable == "LIBTPU_INIT_ARGS" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu is installed: pip install -e '.[aot]'")
    texts = [(LAUNCH / name).read_text() for name in SCRIPTS[variable]]
    flags = sorted({flag for text in texts for flag in re.findall(r"--xla_\w+=\w+", text)})
    assert len(flags) >= 5
    return flags


@pytest.mark.parametrize("variable", SCRIPTS)
def test_an_unknown_flag_would_be_noticed(variable):
    process = start(variable, [*flags_of(variable), "--xla_no_such_flag=true"])
    assert process.returncode != 0
    assert "xla_no_such_flag" in process.stderr + process.stdout


def test_xla_knows_the_flags_for_gpus():
    process = start("XLA_FLAGS", flags_of("XLA_FLAGS"))
    assert process.returncode == 0, process.stderr


def test_libtpu_knows_the_flags_and_gathers_beside_the_computation():
    process = start("LIBTPU_INIT_ARGS", flags_of("LIBTPU_INIT_ARGS"))
    assert process.returncode == 0, process.stderr
    assert "all-gather-start" in process.stdout
