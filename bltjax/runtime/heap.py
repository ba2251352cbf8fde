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


@functools.cache
def give_back_after_compiling():
    """Gives memory back after each long compilation; on CPUs keeps all else for the next step."""
    library = ctypes.CDLL(None)
    trim = getattr(library, "malloc_trim", None)
    if trim is None:
        return
    if jax.default_backend() == "cpu":
        library.mallopt(TRIM_THRESHOLD, NEVER)
        library.mallopt(MMAP_MAX, 0)  # large arrays come from the heap as well

    def compiled(event: str, seconds: float, **_):
        if event == COMPILED and seconds > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
