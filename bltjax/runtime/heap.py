"""Tells the C library when to give memory back to the system (glibc; others are left alone).

A compiler frees hundreds of megabytes in small pieces, which the C library keeps for requests as
small; a program's arrays are large ones, and would come on top. Arrays of a step on a CPU, though,
are taken and freed every time, and a page that comes from the system is zeroed first.
"""

import ctypes
import functools

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of JAX, before the program runs
LONG = 1.0  # seconds of compiling that leave enough to be worth the call
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_ names of mallopt
NEVER = 2**31 - 1


def keep_between_steps():
    """Keeps the memory of arrays that are freed, for the next step, where a CPU computes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and jax.default_backend() == "cpu":
        mallopt(TRIM_THRESHOLD, NEVER)
        mallopt(MMAP_MAX, 0)  # large arrays come from the heap as well


@functools.cache
def give_back_after_compiling():
    """Gives memory back after each long compilation."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def compiled(event: str, seconds: float, **_):
        if event == COMPILED and seconds > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
