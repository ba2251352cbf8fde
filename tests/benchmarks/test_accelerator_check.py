"""The check of a machine with an accelerator: its arithmetic, and all of it, small, on a CPU."""

import importlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.processes import ROOT, environment

pytestmark = pytest.mark.long  # one interpreter will do

SCRIPTS = ROOT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Scripts of benchmarks/ import each other as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield


def part(name: str):
    return importlib.import_module(f"accelerator.{name}")


def run(out, *flags, timeout=300) -> tuple[list[dict], str]:
    """Findings and what was printed."""
    environ = dict(environment(), PYTHONPATH=str(ROOT))
    command = [sys.executable, str(SCRIPTS / "accelerator_check.py"), "--tiny", f"--out={out}"]
    done = subprocess.run(
        [*command, *flags], env=environ, text=True, capture_output=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return part("notes").read_findings(out / "findings.jsonl"), done.stdout


@given(
    rows=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 8),
)
def test_visible_pairs_are_those_of_a_mask(rows, window):
    length = max(map(sum, rows))
    segments = np.array([np.repeat(np.arange(len(r) + 1), [*r, length - sum(r)]) for r in rows])
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    mask = seen & (segments[:, :, None] == segments[:, None])
    assert part("attention").visible_pairs(segments, window) == mask.sum()


def test_documents_are_numbered_along_a_row():
    segments = np.asarray(part("attention").draw_segments(3, 100, 5))
    assert segments.shape == (3, 100) and segments.min() == 0 and segments.max() == 4
    assert (np.diff(segments, axis=1) >= 0).all()
    assert (np.asarray(part("attention").draw_segments(2, 10, 1)) == 0).all()


def test_time_without_any_operation_is_idle():
    # Two that overlap, one inside another, a gap of 3 of 10 seconds.
    events = [("a", 0.0, 2.0), ("b", 1.0, 4.0), ("a", 2.0, 3.0), ("c", 7.0, 10.0)]
    found = part("timing").summary(events)
    assert found["idle"] == pytest.approx(0.3) and found["wall_ms"] == pytest.approx(10_000)
    assert found["launches"] == 4
    by_name = {row["name"]: (row["ms"], row["calls"]) for row in found["top"]}
    assert by_name == {"a": (3000, 2), "b": (3000, 1), "c": (3000, 1)}
    assert part("timing").summary([]) == dict(launches=0, wall_ms=0, idle=None, top=[])


def test_a_bound_reads_weights_once_and_caches_of_every_row():
    needed = part("generation").Needed(weights=10, row=1, global_weights=100, global_row=7)
    assert needed.bytes_a_step(rows=4, calls=0.5) == 10 + 4 + 0.5 * (100 + 4 * 7)


def train_finding(backend, *losses):
    about = dict(stage="train", kind="train", model="m", tables="t", rows=1, row_bytes=8)
    return about | dict(backend=backend, remat="full", losses=list(losses))


@pytest.mark.parametrize(
    ("losses", "close"), [((5.0, 4.0), True), ((5.0, 4.1), False), ((5.0, float("nan")), False)]
)
def test_backends_agree_where_all_their_losses_do(tmp_path, losses, close):
    notes = part("notes").Notes(tmp_path / "f", "end", time.time(), 10, True)
    findings = [train_finding("tiles", 5.0, 4.01), train_finding("cudnn", *losses)]
    part("tables").check_agreement(notes, findings)
    (found,) = part("notes").read_findings(tmp_path / "f")
    assert (found["kind"], found["close"]) == ("agreement", close)


def test_a_smaller_variant_is_tried_only_for_want_of_memory(tmp_path, monkeypatch):
    training, tried = part("training"), []

    def step(notes, variant, about):
        tried.append(variant.tables)
        raise error

    monkeypatch.setattr(training, "_step", step)
    for error, count in ((MemoryError("too much"), 2), (ValueError("no such kernel"), 1)):
        tried.clear()
        file = tmp_path / type(error).__name__
        training.measure(part("notes").Notes(file, "train", time.time(), 10, False), "blt_1b")
        found = part("notes").read_findings(file)
        assert len(tried) == len(found) == count
        assert all(str(error) in finding["reason"] for finding in found)


def test_stages_of_a_group_share_a_process():
    grouped = importlib.import_module("accelerator_check").grouped
    assert grouped(["about", "ceilings", "train:a", "train:b", "about"]) == [
        ["about", "ceilings"],
        ["train:a"],
        ["train:b"],
        ["about"],
    ]


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="error: --stages holds 'bogus'"):
        run(tmp_path, "--stages=about,bogus")


def test_what_is_running_when_the_time_is_up_is_ended_and_told(tmp_path):
    started = time.time()
    findings, printed = run(tmp_path, "--stages=attention", "--seconds=1")
    assert time.time() - started < 30
    (failed,) = [f for f in findings if f["kind"] == "error"]
    assert failed["stage"] == "attention" and "all the time it had" in failed["reason"]
    assert "all the time it had" in printed


def of_kind(findings, kind, *names):
    found = [f for f in findings if f["kind"] == kind]
    return [tuple(f[name] for name in names) for f in found] if names else found


@pytest.mark.slow
def test_every_stage_finds_something_or_says_why_not(tmp_path):
    check = importlib.import_module("accelerator_check")
    findings, printed = run(tmp_path)
    for stage in check.TINY:
        own = [f for f in findings if f["stage"] == stage]
        assert own and own[-1]["kind"] == "done", stage
        assert any(f["kind"] != "done" for f in own), stage
    assert of_kind(findings, "error") == of_kind(findings, "late") == []
    kernels = {f["backend"] for f in of_kind(findings, "impossible") if f["stage"] == "attention"}
    assert kernels == {"cudnn", "mosaic", "splash"}
    assert {backend for (backend,) in of_kind(findings, "attention", "backend")} == {"tiles"}
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in printed and "of_bound" in printed

    # Every backend that runs here computes attention; bfloat16 has 8 bits.
    for dtype, worst in of_kind(findings, "attention error", "dtype", "worst"):
        assert 0 < worst < (2e-2 if dtype == "bfloat16" else 1e-5)
    for forward, rate in of_kind(findings, "attention", "forward_ms", "forward_tflops"):
        assert forward > 0 and rate > 0

    ours = of_kind(findings, "train")
    assert {f["backend"] for f in ours} == {"auto", "tiles"}
    for found in ours:
        assert found["losses"][-1] < found["losses"][0]  # it is the same batch
        step, num_bytes = found["step_s"], found["rows"] * found["row_bytes"]
        assert step == np.median(found["seconds"][1:])
        assert found["bytes_per_s"] == pytest.approx(num_bytes / step)
    assert of_kind(findings, "agreement", "close") == [(True,)]
    for launches, idle, top in of_kind(findings, "profile", "launches", "idle", "top"):
        assert launches >= sum(row["calls"] for row in top) > 0 and 0 <= idle < 1

    for found in of_kind(findings, "generate"):
        assert found["of_bound"] == pytest.approx(found["bound_ms"] / found["ms_a_step"])
        assert found["bytes_a_patch"] > 1 and found["gb_a_step"] > 0
    assert of_kind(findings, "generate", "rows") == [(1,), (2,)]
    assert all(close for (close,) in of_kind(findings, "golden", "close"))
    assert len(of_kind(findings, "golden")) == 2

    peers = of_kind(findings, "peer train")
    if not peers:
        assert "torch and transformers" in of_kind(findings, "impossible")[-1]["reason"]
        return
    ours, theirs = peers
    np.testing.assert_allclose(ours["losses"], theirs["losses"], atol=1e-3)


def test_findings_are_lines_of_json(tmp_path, capsys):
    notes = part("notes").Notes(tmp_path / "f", "golden", time.time() - 5, 10, True)
    notes.write("golden", difference=np.float32(0.5))
    notes.failed(ValueError("two\nlines"), model="m")
    first, second = map(json.loads, (tmp_path / "f").read_text().splitlines())
    assert (first["stage"], first["difference"]) == ("golden", 0.5) and 5 <= first["at"] < 6
    assert second["reason"] == "ValueError: two lines" and second["model"] == "m"
    assert 4 < notes.left <= 5
