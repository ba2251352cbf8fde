"""Compiled programs are kept in a bucket, where a restart on another machine finds them."""

import os
import subprocess
import sys

import pytest

from bltjax.runtime import buckets
from tests.processes import ROOT, environment

pytestmark = pytest.mark.long  # one interpreter will do

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from bltjax.runtime.paths import as_path
as_path(sys.argv[1])  # as train does before it compiles
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
print(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 4)))[0, 0])
print(sum(event.endswith("cache_hits") for event in found))
"""


def compiled(place):
    """(result, programs that were found) of a new process, and what it says beside."""
    own = dict(JAX_COMPILATION_CACHE_DIR=place, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, place],
        env=environment() | own | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    result, hits = done.stdout.split()
    return float(result), int(hits), done.stderr


def test_a_second_process_finds_what_the_first_compiled(bucket):
    first = compiled(os.fspath(bucket))
    names = buckets.below(bucket)
    assert names and all(name.endswith("-cache") for name in names)
    assert first[1:] == (0, "")
    result, hits, said = compiled(os.fspath(bucket))
    assert (result, said) == (first[0], "") and hits >= 1
    assert buckets.below(bucket) == names


def test_a_damaged_program_is_compiled_again(bucket):
    first = compiled(os.fspath(bucket))
    for name in buckets.below(bucket):
        buckets.write(bucket / name, b"damaged")
    result, _, said = compiled(os.fspath(bucket))
    assert result == first[0] and "persistent compilation cache" in said
