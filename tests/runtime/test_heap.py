"""Memory goes back after long compilations, and only then."""

import ctypes
from types import SimpleNamespace

import jax

from bltjax.runtime import heap


def test_given_back_after_long_compilations(monkeypatch):
    calls, listeners = [], []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=calls.append))
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    heap.give_back_after_compiling.__wrapped__()
    for event, seconds in ((heap.COMPILED, 5.0), (heap.COMPILED, 0.1), ("another", 5.0)):
        listeners[0](event, seconds, fun_name="step")
    assert calls == [0]


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", None)
    heap.give_back_after_compiling.__wrapped__()


def test_jax_tells_of_the_event():
    told = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **more: told.append(event)
    )
    jax.jit(lambda x: x + 12345)(1.0)
    assert heap.COMPILED in told
