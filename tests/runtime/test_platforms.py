"""libtpu without a TPU: JAX is told of the platforms that are there, and of nothing else."""

import sys
from pathlib import Path

import pytest

from bltjax.runtime import platforms

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(monkeypatch, tmp_path):
    """place(libtpu, tpu, plugins, environ) -> the environment after skip_absent_tpu."""

    def place(libtpu, tpu, plugins, environ):
        for plugin in plugins:
            (tmp_path / "jax_plugins" / plugin).mkdir(parents=True)
        if libtpu:
            (tmp_path / "libtpu").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "jax_plugins", raising=False)
        monkeypatch.delitem(sys.modules, "jax")  # the real one of these tests stays as it is
        monkeypatch.setattr(platforms, "has_tpu", lambda: tpu)
        platforms.skip_absent_tpu(environ)
        return environ

    return place


@pytest.mark.parametrize(
    "libtpu, tpu, plugins, environ, chosen",
    [
        (False, False, (), {}, None),
        (True, False, (), {}, "cpu"),
        (True, False, ("xla_cuda12",), {}, "cuda,cpu"),
        (True, False, ("xla_cuda12", "metal"), {}, None),
        (True, True, (), {}, None),
        (True, False, (), dict(JAX_PLATFORMS="tpu"), "tpu"),
        (True, False, (), dict(JAX_PLATFORMS=""), "cpu"),
        (True, False, (), dict(TPU_WORKER_HOSTNAMES="a,b"), None),
        (True, False, (), dict(MEGASCALE_NUM_SLICES="2"), None),
    ],
)
def test_the_platforms_of_a_place(place, libtpu, tpu, plugins, environ, chosen):
    before = dict(environ)
    found = place(libtpu, tpu, plugins, environ)
    assert found.get("JAX_PLATFORMS") == chosen
    assert before.items() <= found.items() or before == dict(JAX_PLATFORMS="")


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, False),
        ({"sys/bus/pci/devices/a/vendor": "0x8086", "sys/bus/pci/devices/a/device": "0x1"}, False),
        ({"sys/bus/pci/devices/a/vendor": "0x1ae0", "sys/bus/pci/devices/a/device": "0x42"}, True),
        (
            {"sys/bus/pci/devices/a/vendor": "0x1ae0", "sys/bus/pci/devices/a/device": "0x0042"},
            False,
        ),
        ({"dev/accel0": ""}, True),
        ({"dev/vfio/0": ""}, True),
        ({"dev/vfio/vfio": ""}, False),
    ],
)
def test_what_looks_like_a_tpu(monkeypatch, tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(platforms, "ROOT", tmp_path)
    assert platforms.has_tpu() == expected
