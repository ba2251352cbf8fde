"""The compilers know the flags that the scripts set: one that they do not know ends a process."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.launching import LAUNCH

TPU = "from jax.experimental import topologies as t; t.get_topology_desc('v5e:2x2', platform='tpu')"
COMPILERS = {
    "XLA_FLAGS": (("slurm_gpu.sbatch",), "import jax; jax.devices()"),
    "LIBTPU_INIT_ARGS": (("tpu_vm_worker.sh", "gke/jobset.sh"), TPU),
}


def start(variable, flags):
    """The finished process of a compiler that has been given flags."""
    environ = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", variable: " ".join(flags)}
    command = [sys.executable, "-c", COMPILERS[variable][1]]
    env = {k: v for k, v in os.environ.items() if k not in COMPILERS} | environ
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("variable", COMPILERS)
def test_no_flag_is_unknown(variable):
    if variable == "LIBTPU_INIT_ARGS" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu is installed: pip install -e '.[aot]'")
    texts = [(LAUNCH / name).read_text() for name in COMPILERS[variable][0]]
    flags = sorted({flag for text in texts for flag in re.findall(r"--xla_\w+=\w+", text)})
    assert len(flags) >= 5
    known, other = start(variable, flags), start(variable, [*flags, "--xla_no_such_flag=true"])
    assert known.returncode == 0, known.stderr
    assert other.returncode != 0 and "xla_no_such_flag" in other.stderr + other.stdout
