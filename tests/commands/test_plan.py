"""What a run would take on a thousand chips, against sums of its own."""

import functools
import json
import math
import os
import runpy
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from bltjax import cli, sharding
from bltjax.commands import plan
from bltjax.config import MeshConfig, RunConfig, from_config_dict
from bltjax.costs import memory_plan
from bltjax.costs.chips import GIB
from bltjax.model import functional
from tests import processes

pytestmark = pytest.mark.long  # one interpreter will do

# By which axes a weight is split, by name; norms and byte tables are whole on every chip.
SPLIT = dict.fromkeys(("wq", "wk", "wv", "wo", "w1", "w2", "w3"), ("fsdp", "tensor")) | {
    "output": ("fsdp",),
    "patch_embedding_projection": ("fsdp",),
    "token_embedding_projection": ("fsdp",),
    "encoder_hash_tok_embedding": ("data", "fsdp", "tensor"),
}
SCALARS = 100  # bytes of an optimizer's counters, at most


def settings(path, **changes):
    """Of a config file, changed: blt__remat="full" sets blt.remat."""
    found = runpy.run_path(str(processes.ROOT / path))["get_config"]()
    with found.unlocked():
        found.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return found


@functools.cache
def tiny_plan(**changes) -> memory_plan.MemoryPlan:
    """Of a narrow but deep byte latent transformer on 8 chips."""
    sizes = dict(blt_training__batch_size=32, mesh__fsdp=2, mesh__tensor=2)
    sizes["blt__local_decoder__num_layers"] = 64
    config = from_config_dict(RunConfig, settings("tests/configs/tiny.py", **sizes | changes))
    return memory_plan.plan_stage(config, "blt", sharding.abstract_mesh(config.mesh, 8))


def run_main(monkeypatch, chips, path, time=None, **changes):
    flags = SimpleNamespace(config=path, workdir=None, chips=chips)
    flags.__dict__.update(dict.fromkeys(("chip", "bytes", "mfu", "price")) | (time or {}))
    monkeypatch.setattr("absl.flags.FLAGS", flags)
    monkeypatch.setattr(cli, "_settings", {k.replace("__", "."): v for k, v in changes.items()})
    plan.main(["plan"])


def parameter_bytes(model, mesh) -> int:
    """On a chip, from the names of its weights."""
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(MeshConfig(), 1)):
        leaves = jax.tree_util.tree_leaves_with_path(functional.abstract_params(model))
    pieces = {name: math.prod(mesh[axis] for axis in axes) for name, axes in SPLIT.items()}
    return sum(4 * leaf.size // pieces.get(path[-2].key, 1) for path, leaf in leaves)


# Kept for the gradient from every layer of the global transformer: rows of a chip, patches, width,
# in bfloat16.
LARGEST = {
    "blt_1b": 25 * 1 * 3584 * 2048 * 2,
    "blt_7b": 32 * 4 * 4096 * 4096 * 2,
    "blt_8b": 32 * 4 * 3584 * 4096 * 2,
}


@pytest.mark.parametrize("name", LARGEST)
def test_published_sizes_on_a_thousand_chips_of_16_gb(name, monkeypatch, capsys, no_mesh):
    rows = dict.fromkeys(
        ("entropy_training__batch_size", "blt_training__batch_size", "evaluation__batch_size"), 1024
    )
    changes = dict(mesh__fsdp=64, blt_training__accumulation_steps=1, **rows)
    config = settings(f"configs/{name}.py", **changes)
    started = time.time()
    run_main(monkeypatch, 1024, f"configs/{name}.py", **changes)
    assert time.time() - started < 60
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    tensor = config.mesh.tensor
    mesh = dict(data=16 // tensor, fsdp=64, tensor=tensor)
    assert f"mesh: {mesh} on 1024 chips" in out
    assert result["chips"] == 1024 and list(result["stages"]) == ["entropy_model", "blt"]
    run = from_config_dict(RunConfig, config)
    for stage, model in (("entropy_model", run.entropy_model), ("blt", run.blt)):
        found = result["stages"][stage]
        expected = parameter_bytes(model, mesh)
        assert found["parameters"] == found["gradients"] == expected
        assert 0 <= found["optimizer"] - 2 * expected < SCALARS  # two moments
        together = 4 * expected + found["batch"] + found["largest"]["chip_bytes"]
        assert 0 <= found["total"] - together < SCALARS
        assert found["total"] < 16e9
    assert result["stages"]["blt"]["largest"]["chip_bytes"] == LARGEST[name]
    assert out.count("v5e (16), v5p (95)") == 2


def test_moments_of_the_hash_tables_in_half_the_bytes(no_mesh):
    whole, half = tiny_plan(), tiny_plan(blt_training__optimizer__hash_moments="bfloat16")
    tables = 2 * 101 * 16 // 2  # two tables of 101 rows of 16 features, over fsdp
    assert whole.parameters == half.parameters
    assert abs(whole.optimizer - half.optimizer - 2 * 2 * tables) < SCALARS


def test_what_makes_activations_smaller(no_mesh):
    plain = tiny_plan()
    assert plain.batch == 8 * (64 * (3 * 4 + 1) + 16 * 4)  # rows of a chip; bytes, and patches
    parts = tiny_plan(blt_training__accumulation_steps=4)
    assert parts.largest.chip_bytes == plain.largest.chip_bytes // 4
    again = tiny_plan(blt__remat="full")
    assert again.largest.chip_bytes < plain.largest.chip_bytes
    assert again[:4] == parts[:4] == plain[:4]
    tables = tiny_plan(blt__hash__vocab=400_001)
    assert tables.parameters > plain.parameters + plain.largest.chip_bytes
    assert tables.largest == plain.largest  # no weight, gradient or moment


@pytest.mark.parametrize(
    "rule, patches",
    [
        (dict(patching__rule="byte"), 64),
        (dict(patching__rule="static", patching__patch_size=2), 32),
        ({}, 16),
    ],
)
def test_patches_of_a_row(rule, patches, no_mesh):
    config = from_config_dict(RunConfig, settings("tests/configs/tiny.py", **rule))
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(MeshConfig(), 1)):
        assert memory_plan.abstract_batch(config, "blt")["patch_lengths"].shape == (2, patches)


@pytest.mark.parametrize(
    "chips, changes, said",
    [
        (None, {}, "give --chips=NUMBER"),
        (9, dict(mesh__fsdp=2), "mesh=(-1, 2, 1) (data, fsdp, tensor) does not fit 9 device(s)"),
        (4, dict(mesh__tensor=4), "entropy_model.transformer.num_heads=2 is not divisible by mesh"),
        (4, {}, "entropy_training.batch_size=2 is not divisible by the 4 row shards"),
        (2, dict(blt_training__batch_size=3), "blt_training.batch_size=3 is not divisible"),
        (2, dict(evaluation__batch_size=1), "evaluation.batch_size=1 is not divisible"),
    ],
)
def test_what_does_not_fit_is_one_line(chips, changes, said, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, chips, "tests/configs/tiny.py", **changes)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and said in err


def test_where_it_fits_is_told(capsys):
    largest = memory_plan.Array((2, 3), "float32", "P()", 5 * GIB)
    memory_plan.print_plan(
        "blt", memory_plan.MemoryPlan(10 * GIB, 10 * GIB, 20 * GIB, 0, largest), 1.0
    )
    out = capsys.readouterr().out
    assert "45.000 GiB   within the memory (GiB) of v5p (95), tpu7x (96), a100 (80)" in out
    assert "float32[2, 3] P()" in out
    memory_plan.print_plan(
        "blt", memory_plan.MemoryPlan(50 * GIB, 50 * GIB, 50 * GIB, 0, largest), 1.0
    )
    assert "more than any chip has" in capsys.readouterr().out


def test_the_command_needs_no_device():
    command = [sys.executable, "-m", "bltjax.plan", "--config=tests/configs/tiny.py", "--chips=2"]
    process = subprocess.run(
        [*command, "--config.mesh.tensor=2"],
        cwd=processes.ROOT,
        env=dict(os.environ, JAX_PLATFORMS="no_such_platform"),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert list(json.loads(process.stdout.splitlines()[-1])["stages"]) == ["entropy_model", "blt"]


def test_help():
    command = [sys.executable, "-m", "bltjax.plan", "--help"]
    process = subprocess.run(
        command, cwd=processes.ROOT, capture_output=True, text=True, timeout=60
    )
    assert "--chips" in process.stdout and "--config" in process.stdout


def test_time_and_cost_of_a_run(monkeypatch, capsys, no_mesh):
    time = dict(chip="h100", bytes=1e9, mfu=0.5, price=3.0)
    run_main(monkeypatch, 2, "tests/configs/tiny.py", time)
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])["time"]
    flops = sum(w["num_bytes"] * w["flops_per_byte"] for w in found["work"].values())
    assert found["chip_hours"] == pytest.approx(flops / (0.5 * 989e12) / 3600)
    assert found["hours"] == found["chip_hours"] / 2 and found["cost"] == 3 * found["chip_hours"]
    assert "at 50% of 989 TFLOP/s (as given)" in out and "at 3 a chip-hour" in out


def test_an_mfu_that_nobody_gave_is_called_an_assumption(monkeypatch, capsys, no_mesh):
    run_main(monkeypatch, 2, "tests/configs/tiny.py", dict(chip="v5e"))
    out = capsys.readouterr().out
    assert "at 30% of 197 TFLOP/s (an assumption, give --mfu)" in out
    found = json.loads(out.splitlines()[-1])["time"]
    assert found["mfu"] == 0.3 and "cost" not in found


@pytest.mark.parametrize("flag", ["bytes", "mfu", "price"])
def test_time_without_a_chip_is_refused(flag, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, 2, "tests/configs/tiny.py", {flag: 0.5})
    assert f"--{flag}=0.5 needs --chip, for example --chip=h100" in capsys.readouterr().err
