"""Gives memory that compiling leaves behind back to the system.

A compiler frees hundreds of megabytes in small pieces, which the C library keeps for requests as
small; a program's arrays are large ones, and would come on top.
"""

import ctypes
import functools

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of JAX, before the program runs
LONG = 1.0  # seconds of compiling that leave enough to be worth the call


@functools.cache
def give_back_after_compiling():
    """Gives memory back after each long compilation, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def compiled(event: str, seconds: float, **_):
        if event == COMPILED and seconds > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
