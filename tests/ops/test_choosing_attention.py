"""Which kernel of self-attention a device gets, and what is said where one cannot work."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax._src.mesh import AbstractDevice

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig
from bltjax.model import functional
from bltjax.model.transformer import attention_report
from bltjax.ops import attention as ops
from bltjax.ops.attention import choose_attention
from bltjax.patching.buffers import buffers_from_lengths

DEVICES = {
    "h100": ("NVIDIA H100 80GB HBM3", "gpu"),
    "compiled for": ("H100", "gpu"),
    "gh200": ("NVIDIA GH200 480GB", "gpu"),
    "b200": ("NVIDIA B200", "gpu"),
    "a100": ("NVIDIA A100-SXM4-80GB", "gpu"),
    "amd": ("AMD Instinct MI300X", "gpu"),
    "v5e": ("TPU v5 lite", "tpu"),
    "cpu": ("cpu", "cpu"),
}


def mesh_of(name):
    """A mesh of shapes and a kind of device."""
    kind, platform = DEVICES[name]
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = sharding.make_mesh(devices=jax.devices()[:1]).abstract_mesh
    return mesh.update(abstract_device=device)


def choice(name, setting="auto", dtype="bfloat16", width=64):
    with jax.sharding.use_abstract_mesh(mesh_of(name)):
        return choose_attention(setting, dtype, width)


@pytest.mark.usefixtures("no_mesh")
@pytest.mark.parametrize(
    ("device", "dtype", "width", "kernel", "reason"),
    [
        ("h100", "bfloat16", 64, "cudnn", "NVIDIA H100 80GB HBM3"),
        ("compiled for", "bfloat16", 128, "cudnn", "H100"),
        ("gh200", jnp.float16, 64, "cudnn", "GH200"),
        ("b200", "bfloat16", 64, "cudnn", "B200"),
        ("h100", "float32", 64, "tiles", "float32"),
        ("h100", "bfloat16", 256, "tiles", "not 256"),
        ("h100", "bfloat16", 20, "tiles", "multiple of 8"),
        ("a100", "bfloat16", 64, "tiles", "NVIDIA A100"),
        ("amd", "bfloat16", 64, "tiles", "AMD Instinct"),
        ("v5e", "float32", 64, "splash", "TPU v5 lite"),
        ("cpu", "bfloat16", 64, "tiles", "cpu"),
    ],
)
def test_auto(device, dtype, width, kernel, reason):
    found = choice(device, dtype=dtype, width=width)
    assert found.name == kernel and reason in found.reason


@pytest.mark.usefixtures("no_mesh")
@pytest.mark.parametrize("device", DEVICES)
def test_tiles_work_anywhere(device):
    assert choice(device, "tiles").name == "tiles"


@pytest.mark.usefixtures("no_mesh")
@pytest.mark.parametrize(
    ("device", "setting", "dtype", "width", "told"),
    [
        ("cpu", "cudnn", "bfloat16", 64, "compute capability 9.0"),
        ("a100", "cudnn", "bfloat16", 64, "not NVIDIA A100"),
        ("h100", "cudnn", "float32", 64, "compute_dtype='bfloat16'"),
        ("h100", "cudnn", "bfloat16", 136, "not 136: change num_heads"),
        ("v5e", "mosaic", "bfloat16", 64, "compute capability 9.0"),
        ("h100", "splash", "bfloat16", 64, "needs a TPU, not NVIDIA H100"),
    ],
)
def test_a_kernel_that_cannot_work(device, setting, dtype, width, told):
    """The message names the setting, what is wrong, and the remedy."""
    with pytest.raises(ValueError, match=f"attention='{setting}' .*{told}.*attention='auto'"):
        choice(device, setting, dtype, width)


@pytest.mark.usefixtures("no_mesh")
def test_mosaic_is_another_package(monkeypatch):
    there = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    assert choice("h100", "mosaic").name == "mosaic"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tokamax"):
        choice("h100", "mosaic")


@pytest.mark.usefixtures("no_mesh")
def test_gpus_that_have_no_name_here(monkeypatch):
    """Of a GPU that is there, JAX knows the compute capability."""

    class Device:
        device_kind, compute_capability = "NVIDIA A100-SXM4-80GB", "9.0"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    assert choice("a100").name == "cudnn"
    Device.compute_capability = "8.0"
    assert choice("a100").name == "tiles"
    with pytest.raises(ValueError, match="compute capability"):
        choice("a100", "cudnn")
    Device.compute_capability = "12.0"  # a card for games
    assert choice("a100").name == "tiles"
    assert choice("a100", "cudnn").name == "cudnn"


@pytest.mark.usefixtures("no_mesh")
def test_the_report_names_stacks_and_reasons():
    wide = dataclasses.replace(BLTConfig().global_transformer, dim=512, num_heads=2)
    model = dataclasses.replace(BLTConfig(), compute_dtype="bfloat16", global_transformer=wide)
    with jax.sharding.use_abstract_mesh(mesh_of("h100")):
        assert attention_report(model) == (
            "attention: cudnn (NVIDIA H100 80GB HBM3) in local_encoder, local_decoder; tiles "
            "(cudnn takes heads of a multiple of 8 up to 128, not 256: change num_heads) in "
            "global_transformer"
        )
        entropy_model = dataclasses.replace(EntropyModelConfig(), attention="splash")
        with pytest.raises(ValueError, match="needs a TPU"):
            attention_report(entropy_model)


@pytest.mark.usefixtures("no_mesh")
@pytest.mark.parametrize(
    ("device", "dtype", "called"),
    [
        ("h100", "bfloat16", "cudnn_attention"),
        ("h100", "float32", "unrolled_attention"),
        ("v5e", "float32", "splash_attention"),
        ("cpu", "float32", "tiled_attention"),
    ],
)
def test_the_kernel_is_called(device, dtype, called, monkeypatch):
    calls = []

    def attend(q, *_, **__):
        calls.append(q.dtype)
        return q

    where = ops.cudnn_attention if called == "cudnn_attention" else ops
    monkeypatch.setattr(where, called, attend)
    q, ids = jax.ShapeDtypeStruct((2, 16, 4, 8), dtype), jax.ShapeDtypeStruct((2, 16), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh_of(device)):
        jax.eval_shape(ops.self_attention, q, q, q, ids)
    assert calls == [jnp.dtype(dtype)]


@pytest.mark.usefixtures("no_mesh")
@pytest.mark.parametrize("model", [BLTConfig(attention_block=256), EntropyModelConfig()])
def test_the_block_size_reaches_the_kernel(model, monkeypatch):
    blocks = []

    def attend(q, *_, block):
        blocks.append(block)
        return q

    monkeypatch.setattr(ops, "splash_attention", attend)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh_of("v5e")):
        params = functional.abstract_params(model)
        patches = jax.eval_shape(lambda: buffers_from_lengths(jnp.full((2, 4), 4), 16))
        inputs = [patches] if isinstance(model, BLTConfig) else []
        jax.eval_shape(functools.partial(functional.apply, model), params, tokens, *inputs)
    assert blocks and set(blocks) == {model.attention_block}
