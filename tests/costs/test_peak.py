"""Peak FLOP/s of known devices, and of those that are timed."""

import types

import jax
import pytest

from bltjax.costs import peak as peaks
from bltjax.costs.peak import MATRIX, peak_flops

pytestmark = pytest.mark.long  # one interpreter will do


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5", 459e12),
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
    ],
)
def test_known_devices_have_the_peak_of_their_data_sheet(kind, peak, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert peak_flops("bfloat16") == 4 * peak


@pytest.fixture
def measured_anew():
    peaks._measured_peak.cache_clear()
    yield
    peaks._measured_peak.cache_clear()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 1), (2, 1, 2)], ids=str)
def test_other_devices_are_timed_together_and_once(sizes, use_mesh, monkeypatch, measured_anew):
    clock = iter(range(100))
    seconds = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(peaks, "time", seconds)
    with use_mesh(*sizes):
        devices = sizes[0] * sizes[1] * sizes[2]
        assert peak_flops("float32") == 2 * MATRIX**3 * devices  # a product each, in a second
        asked = next(clock)
        peak_flops("float32")
        assert next(clock) == asked + 1  # nothing was timed again
