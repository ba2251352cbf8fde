"""Memory goes back after long compilations, and on CPUs only then."""

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from bltjax.runtime import heap

ROOT = Path(__file__).parents[2]


def test_given_back_after_long_compilations(monkeypatch):
    calls, listeners = [], []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=calls.append))
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    heap.give_back_after_compiling.__wrapped__()
    for event, seconds in ((heap.COMPILED, 5.0), (heap.COMPILED, 0.1), ("another", 5.0)):
        listeners[0](event, seconds, fun_name="step")
    assert calls == [0]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_arrays_of_a_step_are_kept_for_the_next():
    """Counts the pages that a process gets from the system for an array, taken ten times."""
    program = """
        import ctypes, resource, sys
        from bltjax.runtime import heap
        if sys.argv[1] == "keep":
            heap.keep_between_steps()
        library, size = ctypes.CDLL(None), ctypes.c_size_t(48 << 20)
        library.malloc.restype = ctypes.c_void_p
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            array = ctypes.c_void_p(library.malloc(size))
            ctypes.memset(array, 1, size.value)
            library.free(array)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    faults = {}
    for way in ("keep", "as it is"):
        command = [sys.executable, "-c", textwrap.dedent(program), way]
        environ = dict(os.environ, JAX_PLATFORMS="cpu")
        told = subprocess.run(command, env=environ, cwd=ROOT, text=True, capture_output=True)
        faults[way] = int(told.stdout)
    assert faults["keep"] < 0.2 * faults["as it is"], faults


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", None)
    heap.give_back_after_compiling.__wrapped__()
    heap.keep_between_steps()


def test_jax_tells_of_the_event():
    told = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **more: told.append(event)
    )
    jax.jit(lambda x: x + 12345)(1.0)
    assert heap.COMPILED in told
