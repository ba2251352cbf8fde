"""The speed benchmarks: what they draw, fit and refuse, and each as it is run, small."""

import importlib
import json
import subprocess
import sys
import types

import numpy as np
import pytest

from benchmarks import measuring
from tests.processes import ROOT, environment

pytestmark = pytest.mark.long  # one interpreter will do

SCRIPTS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def test_exponent_is_that_of_a_power():
    sizes = [1, 2, 4, 8]
    assert measuring.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert measuring.exponent(sizes, [7.0] * 4) == pytest.approx(0, abs=1e-9)


def test_actions_take_turns():
    called = []

    def action(name):
        return lambda: called.append(name) or len(called)

    found = measuring.alternate({"a": action("a"), "b": action("b")}, 3)
    assert called == ["a", "b"] * 3
    assert found == {"a": [1, 3, 5], "b": [2, 4, 6]}


@pytest.mark.parametrize("even", [False, True])
def test_patches_hold_the_row_and_the_byte_to_come(even):
    batch = measuring.draw_batch(3, 500, even=even)
    lengths = batch["patch_lengths"]
    assert lengths.min() >= 1 and (lengths.sum(axis=1) == 501).all()
    assert 501 / lengths.shape[1] == pytest.approx(4.5, rel=0.01)
    assert (lengths.max() <= 5) == even
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def test_devices_of_two_kinds_are_refused(script, capsys):
    check = script("comparing").check_same_platform
    check(["gpu", "gpu"])
    with pytest.raises(SystemExit):
        check(["gpu", "cpu"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bltjax runs on gpu and transformers on cpu" in error


def test_a_config_is_measured_at_a_constant_rate(script, monkeypatch):
    comparing = script("comparing")
    chosen = types.SimpleNamespace(
        config=str(ROOT / "configs/quickstart.py"),
        remat="full",
        dtype="bfloat16",
        hash_updates="touched",
    )
    monkeypatch.setattr(comparing.flags, "FLAGS", chosen)
    ((name, (model, optimizer)),) = comparing.models().items()
    assert name == "quickstart" and model.hash.vocab == 32_768
    assert (model.remat, model.compute_dtype) == ("full", "bfloat16")
    assert optimizer.learning_rate == 7e-3
    assert (optimizer.schedule, optimizer.hash_updates) == ("constant", "touched")


def test_settings_of_the_command_line_change_a_config(script, monkeypatch):
    comparing = script("comparing")
    chosen = types.SimpleNamespace(
        config=str(ROOT / "configs/quickstart.py"),
        remat="full",
        dtype="float32",
        hash_updates="dense",
    )
    monkeypatch.setattr(comparing.flags, "FLAGS", chosen)
    monkeypatch.setattr(comparing.cli, "_settings", {"blt.hash.vocab": 10_000})
    ((_, (model, _)),) = comparing.models().items()
    assert model.hash.vocab == 10_000


@pytest.mark.parametrize("fails", ["check", "steps", None])
def test_a_peer_that_fails_leaves_our_row(script, fails):
    comparing = script("comparing")

    def check():
        if fails == "check":
            raise comparing.WorkerError("out of memory")

    def run(who):
        if fails == "steps" and who == comparing.THEIRS:
            raise comparing.WorkerError("out of memory")
        return {who: f"run of {who}"}

    runs, failure = comparing.one_after_the_other(check, run)
    assert list(runs) == ["bltjax"] + ["transformers"] * (fails is None)
    assert failure == ("out of memory" if fails else None)


@pytest.mark.parametrize("fastest", ["XLA", "torch"])
def test_mfu_is_of_the_faster_product(script, fastest):
    times = {"step": [1.0], ("XLA", 64): [1e-6], ("torch", 64): [1e-6]} | {(fastest, 64): [1e-7]}
    found = script("mfu").numbers(measuring.SIZES["tiny"], measuring.draw_batch(2, 64), times)
    assert found["peak of"] == fastest
    assert found["MFU"] == pytest.approx(found["model GFLOP"] / (2 * 64**3 / 1e-7 / 1e9))


def test_mfu_tells_apart_our_files_and_others_by_that_name(script):
    program = """FileNames
1 "{}/bltjax/training/optimizer.py"
FunctionNames
1 "update"
FileLocations
1 {{file_name_id=1 function_name_id=1 line=1}}
StackFrames
1 {{file_location_id=1 parent_frame_id=1}}

ENTRY %main (x: f32[]) -> f32[] {{
  ROOT %y = f32[] negate(%x), metadata={{op_name="neg" stack_frame_id=1}}
}}
"""
    operations = script("mfu").operations
    assert operations(program.format(ROOT))["y"][0] == ("optimizer", "optimizer.py update", "")
    assert operations(program.format("/bltjax/elsewhere"))["y"][0] == ("step", "", "")


def test_an_error_of_a_worker_is_told():
    with (
        measuring.Worker("torch-less", 1) as worker,
        pytest.raises(measuring.WorkerError, match="could not about: KeyError: 'torch-less'"),
    ):
        worker.ask("about")


def run(script: str, *arguments) -> dict:
    """The JSON line of a script."""
    environ = dict(environment(), PYTHONPATH=str(ROOT), JAX_ENABLE_COMPILATION_CACHE="true")
    command = [sys.executable, str(SCRIPTS / script), "--threads=1", *arguments]
    done = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == script.removesuffix(".py")
    assert result["machine"]["threads"] == 1 and result["machine"]["jax"]
    return result


def check_row(row: dict, num_bytes: int):
    assert row["step s"] == np.median(row["seconds"]) > 0
    assert row["bytes/s"] == pytest.approx(num_bytes / row["step s"])


# Of all tests, so that it is compiled once; it shall train as the peer does too.
STEP = "--size=tiny", "--shapes=1x64", "--hash_updates=touched"


@pytest.mark.slow
def test_forward_measures_a_pass():
    (row,) = run("forward.py", *STEP, "--repeats=3")["rows"]
    check_row(row, 64)
    assert len(row["seconds"]) == 3 and row["first s"] > row["step s"]
    assert row["losses"] == [None, None]
    assert row["memory_bytes"]["peak"] > row["memory_bytes"]["baseline"] > 0


@pytest.mark.slow
def test_scaling_in_length_fits_what_it_measures():
    more = "--size=tiny", "--programs=local", "--lengths=32,64", "--repeats=1", "--remat=none"
    result = run("scaling_in_length.py", *more)
    for row, num_bytes in zip(result["rows"], (32, 64), strict=True):
        check_row(row, num_bytes)
    memory = [row["temp MB"] for row in result["rows"]]
    assert result["exponents"]["local"]["temp MB"] == pytest.approx(np.log2(memory[1] / memory[0]))


@pytest.mark.slow
def test_compile_time_is_of_lowering_and_compiling():
    (row,) = run("compile_time.py", *STEP, "--repeats=1", "--layers=1")["rows"]
    assert row["layers"] == 1 and row["ratio"] == 1
    assert row["seconds"] == pytest.approx(row["lower"] + row["compile"])


@pytest.mark.slow
def test_mfu_finds_where_the_time_goes():
    (row,) = run("mfu.py", *STEP, "--repeats=1", "--matrices=64,128", "--profile")["rows"]
    check_row(row, 64)
    fastest = max(rate for rates in row["products"].values() for rate in rates.values())
    assert row["MFU"] == pytest.approx(row["GFLOP/s"] / fastest)
    assert row["GFLOP/s"] == pytest.approx(row["model GFLOP"] / row["step s"])
    shares = [place["products"] + place["rest"] for place in row["places"]]
    assert sum(shares) == pytest.approx(1)
    by_part = {}
    for place in row["places"]:
        by_part[place["part"]] = by_part.get(place["part"], 0) + place["products"]
    assert by_part["global"] > 0 and by_part["decoder"] > 0 and by_part["idle"] == 0
    assert any("touched_rows.py" in place["function"] for place in row["places"])


@pytest.mark.slow
def test_serving_measures_clients_of_a_server(tmp_path):
    pytest.importorskip("uvicorn", reason="the server needs bltjax[serve]")
    picture = tmp_path / "serving.png"
    result = run("serving.py", "--clients=1,3", "--each=2", "--threads=1", f"--png={picture}")
    one, three = result["rows"]
    assert (one["clients"], three["clients"]) == (1, 3) and one["refused"] == three["refused"] == 0
    assert one["requests/s"] == pytest.approx(2 / one["seconds"])
    assert three["requests/s"] == pytest.approx(6 / three["seconds"])
    assert three["alone"] == pytest.approx(three["bytes/s"] / one["bytes/s"])
    assert picture.stat().st_size > 0


@pytest.mark.slow
def test_train_step_and_its_peer_compute_the_same_in_turns():
    pytest.importorskip("torch", reason="the peer needs torch==2.13.0 (CPU)")
    pytest.importorskip("transformers", reason="the peer is transformers>=5.23")
    more = "--repeats=2", "--against=transformers", "--checkpointing"
    ours, theirs = run("train_step.py", *STEP, *more)["rows"]
    for row in (ours, theirs):
        check_row(row, 64)
        assert row["losses"][1] < row["losses"][0]  # it is the same batch
    np.testing.assert_allclose(ours["losses"], theirs["losses"], atol=1e-4)
    assert ours["speed"] == pytest.approx(theirs["step s"] / ours["step s"])
    assert ours["memory"] == pytest.approx(ours["peak MB"] / theirs["peak MB"])
    assert ours["kept for backward"] == "results of linear layers and attention"
    assert theirs["kept for backward"] == "inputs of layers"


def test_block_sizes_of_attention_for_tpus():
    found = run("splash_blocks.py", "--config=quickstart", "--tiny", "--repeats=1")["found"]
    assert {(line["stack"], line["block"]) for line in found} == {
        (stack, block) for stack in ("local", "patches") for block in (128, 256)
    }
    assert all(line["forward_ms"] > 0 for line in found)


def test_bytes_of_a_token_are_those_of_held_out_documents(script):
    hindi = "हिन्दी में लिखा हुआ".encode()
    documents = dict(hi=[hindi] * 5, en=[b"the patch"] * 4 + [b"the patch of the byte"], few=[b"x"])
    found = {row["source"]: row for row in script("token_bytes").measure(documents, 400)}
    assert found.keys() == {"hi", "en"} and found["hi"]["bytes"] == len(hindi)
    assert (
        found["en"]["letters"] == found["en"]["marks"] == 21 / 12
    )  # two words, and " of the byte" in 10
    assert found["hi"]["marks"] > 1.5 * found["hi"]["letters"]
