"""Programs compiled for chips that are not there, and what is said where that cannot be done."""

import importlib.util
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from bltjax.cli import USER_ERROR
from bltjax.commands import aot
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    RunConfig,
    TransformerConfig,
    from_config_dict,
)
from bltjax.costs import compile_report, compiler_errors, programs, topology
from bltjax.costs.chips import CHIPS, GIB
from bltjax.costs.flops import flops_per_byte
from tests import processes
from tests.commands.test_plan import settings

pytestmark = pytest.mark.long  # one interpreter will do

NO_LIBTPU = "libtpu is not installed: pip install -e '.[aot]'"


def run(*arguments, timeout=200):
    return subprocess.run(
        [sys.executable, "-m", "bltjax.aot", "--config=configs/quickstart.py", *arguments],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def check_report(found: dict, chip: str, optimizer: bool, most: float = 2, rounding: float = 0.01):
    """Checks a report; most: compiled FLOPs over the model's, rounding: beside the traced ones."""
    assert found["hbm_bytes_per_chip"] == CHIPS[chip].hbm_bytes
    assert 0 < found["parameter_bytes"] < found["peak_bytes_per_chip"] < 2 * GIB
    assert (found["optimizer_bytes"] > 2 * found["parameter_bytes"]) == optimizer
    assert found["model_flops"] < found["compiled_flops"] < most * found["model_flops"]
    assert found["compiled_flops"] == pytest.approx(found["traced_flops"], rel=rounding)
    assert found["unknown_kernels"] == [] and found["rematerialization_warnings"] == 0
    assert found["config"] == "configs/quickstart.py"
    assert found["hash_table_bytes"] == 32_768 * 64 * 4
    roofline = found["roofline"]
    times = {name: roofline[f"{name}_seconds"] for name in ("compute", "hbm", "links")}
    assert times["compute"] == found["compiled_flops"] / CHIPS[chip].flops
    assert roofline["step_seconds"] == times[roofline["binds"]] == max(times.values())
    assert 0 < roofline["mfu"] < 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=NO_LIBTPU)
def test_the_quickstart_on_four_tpus(tmp_path):
    text = tmp_path / "step.hlo"
    sizes = ["--config.blt_training.batch_size=4", "--config.mesh.fsdp=2"]
    process = run("--topology=v5e:2x2", *sizes, f"--text={text}")
    assert (process.returncode, process.stderr) == (0, "")
    found = json.loads(process.stdout.splitlines()[-1])
    check_report(found, "v5e", optimizer=True)
    assert found["fits"] and "of 16 GiB a device: fits" in process.stdout
    assert found["mesh"] == dict(data=2, fsdp=2, tensor=1)
    assert set(found["collective_bytes"]) >= {"all-gather", "reduce-scatter"}
    assert found["largest_collective"]["source"].startswith(str(processes.ROOT))
    share = found["largest_collective"]["num_bytes"] / found["hash_table_bytes"]
    assert f"{share:.2%} of a hash table" in process.stdout
    assert found["unknown_loops"] == []
    assert text.read_text().startswith("HloModule jit_train_step")


@pytest.mark.usefixtures("cuda_plugin")
def test_reading_prompts_on_four_gpus():
    sizes = ["--config.blt_training.batch_size=4", "--config.mesh.fsdp=2"]
    process = run("--topology=h100:1x1x4", "--program=prefill", *sizes)
    assert (process.returncode, process.stderr) == (0, "")
    found = json.loads(process.stdout.splitlines()[-1])
    # The caches of patches are read whole, and products have their rows filled up for tensor cores.
    check_report(found, "h100", optimizer=False, most=3, rounding=0.1)
    assert found["launches"]["kernels"] > 100 and "GPU launches" in process.stdout


@pytest.mark.parametrize(
    "name, said",
    [
        ("v5litepod-16", "v5litepod-16 is v5e:4x4"),
        ("v9:2x2", "is not known: give one of v4:4x4x4, v5e:16x16, v5p:4x4x8"),
        ("v5p:4x4", "has 2 sizes, v5p takes 3 from 1: for example v5p:4x4x8"),
        ("v5e:0x4", "has 2 sizes, v5e takes 2 from 1"),
        ("v5e:32x32", "has 1024 chips, and a pod of v5e at most 256: give a smaller one, and --sl"),
        ("v5p:99999x99999x2", "and a pod of v5p at most 8960"),
    ],
)
def test_what_is_no_topology(name, said):
    with pytest.raises(ValueError, match=said):
        topology.topology_devices(name)


def test_what_compiles_must_be_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"by libtpu, .*: pip install -e '\.\[aot\]'"):
        topology.topology_devices("v5e:2x2")
    with pytest.raises(ValueError, match=r"by jax_cuda13_plugin or .*'\.\[aot\]'"):
        topology.topology_devices("a100:1x1x8")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give --topology, for example --topology=v5e:16x16"),
        (["--topology=v5e:4"], "error: --topology=v5e:4 has 1 sizes"),
        (["--topology=v5e:2x2", "--stage=entropy_model", "--program=decode"], "--stage=blt"),
        (["--topology=v5e:2x2", "--blocks=4"], "--blocks=4 is of generation: --program=decode"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    process = run(*arguments)
    assert process.returncode == 2 and process.stdout == ""
    assert len(process.stderr.splitlines()) == 1 and said in process.stderr


def test_without_a_config():
    command = [sys.executable, "-m", "bltjax.aot", "--topology=v5e:2x2"]
    process = subprocess.run(
        command, cwd=processes.ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.stderr == "error: give --config=NAME, for example --config=quickstart\n"


@pytest.fixture
def on_cpus(monkeypatch):
    """Compiles for two CPUs as if they were a topology -> a function of settings and program."""

    def compile_program(changes, program):
        config = from_config_dict(RunConfig, settings("configs/quickstart.py", **changes))
        return compile_report.compile_program(config, "two", 1, "blt", program, None)

    two = CHIPS["v5e"], jax.devices()[:2]
    monkeypatch.setattr(topology, "topology_devices", lambda name, slices: two)
    return compile_program


def test_what_training_refuses_is_not_compiled(on_cpus):
    with pytest.raises(ValueError, match=r"blt_training\.batch_size=3 is not divisible by the 2"):
        on_cpus(dict(blt_training__batch_size=3), "train")
    with pytest.raises(ValueError, match="hash_updates='touched' is for one device"):
        on_cpus(dict(blt_training__optimizer__hash_updates="touched"), "train")


def test_what_the_compiler_refuses_has_the_same_keys(on_cpus, monkeypatch, capsys):
    refused = "RESOURCE_EXHAUSTED: Used 20.25G of 15.75G hbm."

    def refuse(self):
        raise jax.errors.JaxRuntimeError(refused)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    found = on_cpus({}, "prefill")
    assert (found["fits"], found["refused"]) == (False, refused)
    for name in ("compiled_flops", "collective_bytes", "unknown_loops", "roofline"):
        assert found[name] is None
    compile_report.print_report(found)
    assert f"the compiler refused: {refused}" in capsys.readouterr().out
    refused = "RESOURCE_EXHAUSTED: Used 20.25M of 16.00M vmem, hbm has room."
    with pytest.raises(jax.errors.JaxRuntimeError):
        on_cpus({}, "prefill")


@pytest.mark.parametrize(
    "reason, said",
    [
        ("RESOURCE_EXHAUSTED: Used 20.25M of 16.00M vmem.", "the compiler ran out of vmem, which"),
        ("RESOURCE_EXHAUSTED: Out of luck.", "the compiler failed: choose another"),
        ("INTERNAL: vmem: RET_CHECK\nfailure" + 2000 * " in", "failed: .*CHECK failure in .*...."),
    ],
)
def test_other_failures_are_one_sentence(reason, said):
    assert re.search(said, compiler_errors.failure(reason))
    assert len(compiler_errors.failure(reason)) < 600 and "\n" not in compiler_errors.failure(
        reason
    )


FAILING = """
import os
from bltjax import cli
from bltjax.commands import aot
def fail(*_):
    from jax.errors import JaxRuntimeError
    os.write(2, b"what XLA logged\\n")
    raise JaxRuntimeError("INTERNAL: no")
aot.compile_program = fail
cli.run(aot.main, aot.define_flags)
"""


def test_a_compiler_that_fails_is_no_program_that_does_not_fit():
    command = [
        sys.executable,
        "-c",
        FAILING,
        "--config=configs/quickstart.py",
        "--topology=v5e:2x2",
    ]
    process = subprocess.run(
        command, cwd=processes.ROOT, capture_output=True, text=True, timeout=60
    )
    *logged, error = process.stderr.splitlines()
    assert process.returncode == USER_ERROR != aot.DOES_NOT_FIT
    assert logged[-1] == "what XLA logged" and error.startswith("error: the compiler failed: ")
    assert error.endswith("(INTERNAL: no)")


@pytest.mark.parametrize(
    "refused, peak",
    [
        (
            "total memory required for HLO temporaries (36.50G) exceeds available HBM (15.75G).",
            36.5,
        ),
        ("Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.5G.", 20.25),
        ("Used 20.25M of 16.00M vmem.", None),
    ],
)
def test_what_does_not_fit(refused, peak, capsys):
    made = SimpleNamespace(parameter_bytes=3 * GIB, optimizer_bytes=6 * GIB, batch_bytes=0)
    found = compile_report.memory(made, CHIPS["v5e"], None, refused)
    assert not found["fits"] and found["refused"] == refused
    compile_report.print_report(found | dict(compile_seconds=1.0, roofline=None))
    out = capsys.readouterr().out
    if peak is None:
        assert found["peak_bytes_per_chip"] is None and "unknown" in out
        assert "does not fit: try a larger mesh.fsdp, hash_moments='bfloat16'" in out
    else:
        assert found["peak_bytes_per_chip"] == peak * GIB
        assert found["temp_bytes"] == (peak - 9) * GIB
        assert "does not fit: try more accumulation_steps" in out


LOGGING = """
import os, sys
from bltjax.costs import compile_report as aot
with aot.captured_log() as log:
    os.write(2, b"E0101 spmd.cc] Involuntary full rematerialization. The compiler was not able")
    print("shown", file=sys.stderr)
    log.seek(0)
    print(log.read().count(aot.REMATERIALISED))
os.write(2, b"after")
"""


def test_the_log_of_the_compiler_is_kept_from_the_terminal():
    command = [sys.executable, "-c", LOGGING]
    process = subprocess.run(
        command, cwd=processes.ROOT, capture_output=True, text=True, timeout=60
    )
    assert (process.stdout, process.stderr) == ("1\n", "shown\nafter")


def test_what_remat_computes_again():
    stack = TransformerConfig(dim=8, num_layers=3, num_heads=2, window=4)
    parts, again = {}, {}
    for remat in ("none", "dots", "full"):
        model = EntropyModelConfig(transformer=stack, remat=remat)
        parts = flops_per_byte(model, 64)
        again[remat] = programs.recomputed_per_byte(model, 64, 1.0)
    assert again["none"] == again["dots"] == 0 and again["full"] == parts["transformer"]
    for everywhere in (False, True):
        cross = CrossAttentionConfig(all_layers_encoder=everywhere)
        model = BLTConfig(remat="full", cross_attention=cross)
        parts = flops_per_byte(model, 64, 4.0)
        scanned = ["encoder", "global", "decoder", "decoder_cross"] + everywhere * ["encoder_cross"]
        again = programs.recomputed_per_byte(model, 64, 4.0)
        assert again == pytest.approx(sum(parts[name] for name in scanned))


@pytest.mark.parametrize("rows", [1, 3])
def test_programs_that_serve(rows, no_mesh):
    """A piece of prompts, and a byte of each row, need the FLOPs of their bytes and patches."""
    from bltjax import sharding
    from bltjax.costs import jaxpr_flops

    config = from_config_dict(RunConfig, settings("configs/quickstart.py"))
    with jax.set_mesh(sharding.make_mesh(config.mesh, jax.devices()[:1])):
        prefill = programs.trace(config, "blt", "prefill", rows)
        decode = programs.trace(config, "blt", "decode", rows)
    assert prefill.num_bytes == 128 * rows and decode.num_bytes == rows
    for program, patch_bytes in ((prefill, 4.5), (decode, 1.0)):
        needed = program.num_bytes * flops_per_byte(config.blt, 1024, patch_bytes)["total"]
        assert needed < program.model_flops < 1.4 * needed  # and the entropy model's
        written = jaxpr_flops.Work(program.traced.jaxpr).flops
        assert 0.8 * program.model_flops < written < 2 * program.model_flops


def test_the_program_that_fills_in_blocks(no_mesh):
    """A step reads 4 bytes in the byte stacks, in the decoder twice, and the same patch."""
    from bltjax import sharding
    from bltjax.costs import jaxpr_flops

    config = from_config_dict(
        RunConfig, settings("configs/quickstart.py", **{"blt.diffusion_block": 4})
    )
    with jax.set_mesh(sharding.make_mesh(config.mesh, jax.devices()[:1])):
        plain, blocks = (programs.trace(config, "blt", "decode", 2, size) for size in (0, 4))
        with pytest.raises(ValueError, match=r"blocks=8: the decoder was trained .* of 4 bytes"):
            programs.trace(config, "blt", "decode", 2, 8)
    written = [jaxpr_flops.Work(made.traced.jaxpr).flops for made in (plain, blocks)]
    assert 1.5 * written[0] < written[1] < 8 * written[0]
    assert blocks.num_bytes == plain.num_bytes and blocks.model_flops == plain.model_flops


@pytest.mark.parametrize("unit", ["bytes", "tokens"])
def test_rates_are_of_what_a_batch_holds(unit):
    work = dict(compiled_flops=3e12, hbm_traffic_bytes=0, received_bytes=0, model_flops=2e12)
    found = compile_report.roofline(work, CHIPS["v5e"], 4096, unit)
    assert found["binds"] == "compute" and found["unit"] == unit
    seconds = 3e12 / CHIPS["v5e"].flops
    assert found[f"{unit}_per_second"] == pytest.approx(4096 / seconds)
    assert found["mfu"] == pytest.approx(2 / 3)
    assert ("bytes_per_second" in found) == (unit == "bytes")
