"""Commands of the package as real processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def compiling_once(cache) -> dict[str, str]:
    """An environment of one device whose processes share their compilations."""
    return dict(
        os.environ,
        JAX_COMPILATION_CACHE_DIR=str(cache),
        XLA_FLAGS="--xla_backend_optimization_level=0",
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def start(module: str, *arguments, env: dict[str, str], stderr=subprocess.PIPE):
    """`python -m module arguments` in the repository's root, its output piped."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
