"""The studies: their configs and plans, what points share, how they run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.studies import (
    ablations,
    blocks,
    fixed_inference,
    languages,
    multilingual,
    pages,
    points,
    recipe,
    robustness,
    scaling,
    shared,
    study,
)
from benchmarks.studies.points import Point, account, run_config
from bltjax.config.data import SourceConfig
from configs.studies import blt as blt_file
from configs.studies import entropy as entropy_file
from configs.studies import tokens as tokens_file
from tests.processes import ROOT, environment

SIZES = study.SIZES


@pytest.fixture
def given(tmp_path):
    """Settings of a dry run, by size."""
    return lambda size: study.Settings(tmp_path, tmp_path / "out", "", ["*"], size, 2, True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_families_share_the_trunk_and_the_rate(size, level):
    blt = run_config(Point("", f"blt.py:{size},level={level}", 4.0, {}, {}))
    tokens = run_config(Point("", f"tokens.py:{size},level={level}", 4.0, {}, {}))
    trunk, stack = blt.blt.global_transformer, tokens.token_model.transformer
    assert trunk == stack
    optimizer = blt.blt_training.optimizer
    if size == "laptop":
        assert (optimizer.local_rate, optimizer.hash_rate) == (0.5, 2.5)
    else:  # each stack by its own width
        assert optimizer.local_rate == optimizer.hash_rate == trunk.dim / blt.blt.local_encoder.dim
    of_tables = dict(local_rate=1.0, hash_rate=1.0, hash_updates="dense")
    assert dataclasses.replace(optimizer, **of_tables) == tokens.token_training.optimizer
    assert blt.blt_training.batch_size == tokens.token_training.batch_size
    assert blt.blt_training.row_bytes == 4 * tokens.token_training.row_bytes
    assert blt.stages == ("blt", "evaluate") and tokens.stages == ("token_model", "evaluate")
    if size == "laptop":
        assert blt.blt.hash.vocab <= 16_384


@pytest.mark.parametrize("size", ["gpu", "pod"])
def test_a_wider_trunk_learns_more_slowly(size):
    given = [
        run_config(Point("", f"{file}.py:{size},dim=640", 4.0, {}, {}))
        for file in ("blt", "tokens")
    ]
    rates = [
        given[0].blt_training.optimizer.learning_rate,
        given[1].token_training.optimizer.learning_rate,
    ]
    assert rates == [blt_file.RATE_TIMES_WIDTH[size] / 640] * 2
    assert given[0].blt.global_transformer.dim == given[1].token_model.transformer.dim == 640


@pytest.mark.parametrize("size", SIZES)
def test_the_shared_entropy_model_is_a_run(size, tmp_path):
    config = run_config(Point("", f"entropy.py:{size},corpus={tmp_path}", 1.0, {}, {}))
    assert config.stages == ("entropy_model",)
    points_have = run_config(Point("", f"blt.py:{size}", 4.0, {}, {}))
    assert config.entropy_model == points_have.entropy_model
    rows = [
        (c.entropy_training.steps, c.entropy_training.batch_size, c.entropy_training.row_bytes)
        for c in (config, points_have)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("file", [blt_file, tokens_file, entropy_file])
def test_another_size_is_refused(file):
    with pytest.raises(ValueError, match="'phone' must be one of laptop, gpu, pod"):
        file.get_config("phone")


def test_files_of_records_or_directories_are_sources(tmp_path):
    sources = entropy_file.sources
    for name in ("a.jsonl.gz", "b.parquet", "README.md", ".hidden.jsonl"):
        (tmp_path / name).touch()
    assert sources(tmp_path) == [tmp_path / "a.jsonl.gz", tmp_path / "b.parquet"]
    assert sources(tmp_path / "a.jsonl.gz") == [tmp_path / "a.jsonl.gz"]
    text = tmp_path / "text"
    (text / "en").mkdir(parents=True)
    (text / "de").mkdir()
    assert sources(text) == [text / "de", text / "en"]
    (text / "top.txt").touch()
    assert sources(text) == [text]


@pytest.mark.parametrize("size", SIZES)
def test_scaling_spends_its_budgets(size, given):
    planned, budgets = scaling.plan(given(size)), scaling.BUDGETS[size]
    assert len(planned) == len({p.name for p in planned}) == 7 * 5 + 3
    assert budgets[-1] / budgets[0] == pytest.approx(8) and len(budgets) == 3
    for point in planned:
        found = account(point)
        assert found.training == pytest.approx(budgets[point.about["level"]], rel=0.05)
        assert (found.entropy_model > 0) == ("entropy" in point.about["family"])
        assert run_config(point).data.seed == point.about["seed"]
    costs = {p.about["family"]: account(p).model["total"] for p in planned}
    for family in ("bytes", "bytes with tables", "BPE with tables"):
        assert costs[family] == pytest.approx(costs["BPE"], rel=0.1)


@pytest.mark.parametrize("size", SIZES)
def test_inference_costs_the_same_at_any_patch(size, given):
    planned = fixed_inference.plan(given(size))
    for level in fixed_inference.LEVELS[size]:
        own = [p for p in planned if p.about["level"] == level]
        costs = {p.about["family"]: account(p).model["total"] for p in own}
        of_bytes = costs.pop("bytes with tables")  # narrow, so that a step in width is a large one
        assert max(costs.values()) < 1.05 * min(costs.values())
        assert of_bytes == pytest.approx(costs["BPE"], rel=0.1)
        bytes_of = {round(account(p).num_bytes / 1e5) for p in own}
        assert len(own) == 16 and len({p.name for p in own}) == 16
        for wanted in fixed_inference.TRAINING_BYTES[size]:
            assert any(abs(1e5 * b / wanted - 1) < 0.05 for b in bytes_of)
        widths = {
            p.about["family"]: run_config(p).blt.global_transformer.dim
            for p in own
            if p.stage == "blt"
        }
        assert widths["BLT entropy 4"] < widths["BLT entropy 6"] < widths["BLT entropy 8"]


@pytest.mark.parametrize("size", SIZES)
def test_pairs_are_trained_equally(size, given):
    plain = shared.assumed(given(size).directory, size)
    pairs = robustness.plan(given(size), plain, plain)
    blt, *others = multilingual.plan(given(size), plain)
    assert len(others) == 4
    for blt, other in (pairs[:2], pairs[2:], *((blt, other) for other in others)):
        blt, other = account(blt), account(other)
        assert blt.training == pytest.approx(other.training, rel=0.05)
        assert blt.num_bytes == pytest.approx(other.num_bytes, rel=0.05)


@pytest.mark.parametrize("size", SIZES)
def test_baselines_have_the_tables_of_the_blts(size, given):
    """As many, of the same rows and width, with the same rate: as many parameters in them."""
    planned = scaling.plan(given(size))
    with_tables = {p.about["family"] for p in planned if "with tables" in p.about["family"]}
    assert with_tables == {"bytes with tables", "BPE with tables"}
    for point in planned:
        config, blt = run_config(point), blt_file.get_config(f"{size},level={point.about['level']}")
        if point.stage == "blt":
            continue
        model, training = config.token_model, config.token_training
        if point.about["family"] not in with_tables:
            assert model.hash.sizes == ()
            continue
        own, published = model.hash, blt.blt.hash
        assert (own.vocab, model.hash_width) == (published.vocab, blt.blt.local_encoder.dim)
        assert own.num_tables == len(published.sizes) * published.num_functions
        if point.about["family"] == "bytes with tables":
            assert own.sizes == tuple(published.sizes)
        rates = [
            o.learning_rate * o.hash_rate for o in (training.optimizer, blt.blt_training.optimizer)
        ]
        assert rates[0] == pytest.approx(rates[1])


def test_words_of_each_tokenizer(given):
    points_of = {
        p.name: p
        for p in multilingual.plan(
            given("laptop"), shared.assumed(given("laptop").directory, "laptop")
        )
    }
    paths = [points_of[name].settings["tokenizer.path"] for name in ("BPE", "BPE_marks")]
    assert [path.rpartition("/")[2] for path in paths] == ["tokenizer.json", "tokenizer-marks.json"]
    assert points_of["BPE_marks_tables"].settings["tokenizer.path"] == paths[1]
    assert "tokenizer.path" not in points_of["bytes_tables"].settings


@pytest.mark.parametrize("size", SIZES)
def test_every_change_of_blocks_reads_the_same_bytes(size, given):
    shared_parts = shared.assumed(given(size).directory, size)
    plain, baseline, *changes = blocks.plan(given(size), shared_parts)
    assert len({p.name for p in (plain, baseline, *changes)}) == len(changes) + 2 >= 12
    base = run_config(baseline)
    assert (run_config(plain).blt.diffusion_block, base.blt.diffusion_block) == (0, 4)
    for point in changes:
        config = run_config(point)
        assert config.blt.diffusion_block > 0
        assert account(point).num_bytes == account(plain).num_bytes
        varied = "blt", "patching", "blt_training"
        now, before = ([getattr(c, name) for name in varied] for c in (config, base))
        assert sum(a != b for a, b in zip(now, before, strict=True)) in (1, 2)
        cost = blocks.training_flops_per_byte(point) / account(point).model["total"]
        assert 1.2 < cost < 6
    assert blocks.training_flops_per_byte(plain) == account(plain).model["total"]


@pytest.mark.parametrize("size", SIZES)
def test_every_ablation_is_a_change_and_reads_the_same_bytes(size, given):
    baseline, *changes = ablations.plan(given(size))
    names = {p.name for p in changes}
    assert len(names) == len(changes) >= 18
    base = run_config(baseline)
    for point in changes:
        config = run_config(point)
        assert account(point).num_bytes == account(baseline).num_bytes
        varied = "blt", "patching", "entropy_model", "blt_training"
        now, before = ([getattr(c, name) for name in varied] for c in (config, base))
        assert now != before
        if point.about["group"] != "rate":
            assert now[-1] == before[-1]
        own_records = config.data.records != base.data.records
        assert own_records == (point.about["group"] == "entropy model")


@pytest.mark.parametrize("size", SIZES)
def test_every_change_of_the_recipe_is_one_and_reads_the_same_bytes(size, given):
    points_of = {point.name: point for point in recipe.plan(given(size))}
    baseline = points_of[recipe.BASELINE]
    base, num_bytes = run_config(baseline), account(baseline).num_bytes
    others = {name: point for name, point in points_of.items() if point is not baseline}
    assert len(others) >= 30
    for point in others.values():
        config = run_config(point)
        assert account(point).num_bytes == pytest.approx(num_bytes, rel=0.01)
        same_width = point.about.get("width") == base.blt.local_encoder.dim
        same_rate = point.about.get("rate") == base.blt_training.optimizer.learning_rate
        assert (config == base) == (same_width and same_rate), point.name
    assert base.blt_training.optimizer.matrices == "muon"
    before = run_config(points_of["before-one_rate"]).blt_training.optimizer
    assert before.learning_rate == 1.5 * recipe.RATE[size] and before.matrices == "adam"


@pytest.mark.parametrize("size", SIZES)
def test_languages_differ_in_the_rule_or_the_entropy_model_alone(size, given):
    before, *others = languages.plan(given(size))
    base, names = run_config(before), {p.name for p in others}
    assert base.patching.rule == languages.BEFORE and len(names) == len(others) == 4
    assert languages.AFTER in {run_config(p).patching.rule for p in others}
    for point in others:
        config = run_config(point)
        assert account(point).num_bytes == account(before).num_bytes
        assert config.blt == base.blt and config.blt_training == base.blt_training
        assert config.patching.target_patch_bytes == base.patching.target_patch_bytes
        larger = config.entropy_model != base.entropy_model
        assert larger == (config.data.records != base.data.records)
        assert larger or config.patching != base.patching
        if larger:
            assert account(point).entropy_model > 2 * account(before).entropy_model


def test_a_sample_takes_of_each_source_its_share(tmp_path):
    sources = []
    for name, count in (("large", 80), ("small", 20), ("tiny", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.txt").write_bytes(b"\xff" + bytes([i]) * 999)
        sources.append(SourceConfig(name=name, path=str(tmp_path / name)))

    def sizes(balanced):
        found = shared.sample(sources, 30_000, balanced)
        return {name: len(documents) for name, documents in found.items()}

    assert sizes(balanced=False) == dict(tiny=1, small=6, large=23)
    # What the smallest lacks the others share.
    assert sizes(balanced=True) == dict(tiny=2, small=14, large=14)
    assert shared.sample(sources, 30_000, True) == shared.sample(sources, 30_000, True)


def test_another_corpus_takes_another_workdir(tmp_path):
    made = dict(token_bytes=3.0, token_bytes_marks=3.5, space_bytes=5.0)
    made |= dict(made_of=["laptop", "", ["*"], {}])
    (tmp_path / "measured.json").write_text(json.dumps(made))
    assert shared.prepare(tmp_path, "laptop", "", ["*"]).token_bytes == 3.0
    with pytest.raises(ValueError, match="give another --workdir"):
        shared.prepare(tmp_path, "laptop", "", ["en_*"])
    del made["token_bytes_marks"]  # of before it was measured
    (tmp_path / "measured.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match="give another --workdir"):
        shared.prepare(tmp_path, "laptop", "", ["*"])


def test_sources_that_match_nothing_are_named(tmp_path):
    (tmp_path / "en.jsonl").touch()
    with pytest.raises(ValueError, match=r"--sources=de\* match none of en"):
        shared.chosen_sources(str(tmp_path), ["de*"])


FINISH = """
import json, pathlib, sys, time
workdir = pathlib.Path(sys.argv[1])
workdir.mkdir(exist_ok=True)
with (workdir / "started").open("a") as file:
    file.write("x")
time.sleep(float(sys.argv[2]))
(workdir / "result.json").write_text(json.dumps(dict(bits_per_byte=1.0)))
"""


@pytest.fixture
def quick(monkeypatch):
    """Points whose processes only sleep, for the seconds in their settings, or fail."""

    def command(point, directory):
        seconds = point.settings["seconds"]
        given = [str(directory / point.name), str(seconds)]
        return [
            sys.executable,
            "-c",
            FINISH if seconds is not None else "raise SystemExit(3)",
            *given,
        ]

    monkeypatch.setattr(points, "command", command)
    monkeypatch.setattr(points, "POLL_SECONDS", 0.02)
    return lambda name, seconds: Point(name, "blt.py:laptop", 4.0, dict(seconds=seconds), {})


def starts(directory, name) -> int:
    return len((directory / name / "started").read_text())


def test_finished_points_are_kept_and_failed_ones_named(tmp_path, quick):
    planned = [quick("a", 0), quick("b", 0), quick("bad", None), quick("c", 0)]
    assert points.run(planned[:2], tmp_path, jobs=1) == []
    assert points.run(planned, tmp_path, jobs=2) == ["bad"]
    assert [starts(tmp_path, name) for name in "abc"] == [1, 1, 1]


def test_several_points_run_at_a_time(tmp_path, quick):
    started = time.monotonic()
    assert points.run([quick(name, 1) for name in "abc"], tmp_path, jobs=3) == []
    assert time.monotonic() - started < 2.9


def test_a_point_that_another_study_runs_is_waited_for(tmp_path, quick):
    point = quick("a", 0)
    (tmp_path / "a.lock").touch()
    code = (
        "import fcntl, sys, time, pathlib; f = open(sys.argv[1], 'r+'); "
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(0.5); "
        "d = pathlib.Path(sys.argv[2]); d.mkdir(); "
        "(d / 'result.json').write_text('{\"bits_per_byte\": 2.0}')"
    )
    arguments = [str(tmp_path / "a.lock"), str(tmp_path / "a")]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        assert points.run([point], tmp_path, jobs=1) == []
    assert not (tmp_path / "a" / "started").exists()


def test_a_signal_stops_the_points_too(tmp_path, quick, monkeypatch):
    started = []
    real = points._start

    def start(*arguments):
        started.append(real(*arguments))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[-1]

    monkeypatch.setattr(points, "_start", start)
    with pytest.raises(SystemExit) as stopped, study.guarded():
        points.run([quick("a", 60)], tmp_path, jobs=1)
    assert stopped.value.code == 75
    ((_, process, _),) = started
    assert process.returncode == -signal.SIGTERM


def test_settings_reach_the_command_line(tmp_path):
    point = Point("p", "blt.py:laptop", 4.0, {"blt.hash.sizes": (3,), "blt.hash.vocab": 7}, {})
    point = points.with_settings(point, {"blt.cross_attention.encoder": False})
    given = points.command(point, tmp_path)[5:]
    assert given == [
        "--config.blt.hash.sizes=(3,)",
        "--config.blt.hash.vocab=7",
        "--config.blt.cross_attention.encoder=False",
    ]
    config = run_config(point)
    assert config.blt.hash.sizes == (3,) and not config.blt.cross_attention.encoder


def test_spelling_is_learned_from_other_words():
    words = [a + b for a in "bcdfghjklm" for b in ("oat", "ear", "ind", "ore")]
    text = b"".join(robustness.spelling_text(words[:20], 20_000)).decode()
    assert 10_000 < len(text) < 40_000
    assert f'Spell the word "{words[0]}".\nAnswer: {" ".join(words[0])}' in text
    assert not any(f'"{word}"' in text for word in words[20:])


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_stopped(tmp_path):
    """Two toy points, as processes: one is finished, the other is killed on its way."""
    script = f"""
import sys
from pathlib import Path
from benchmarks.studies import pages, points, scaling, shared, study
shared.SAMPLE_BYTES["laptop"] = 300_000
directory = Path({str(tmp_path)!r})
toy = {{"entropy_training.steps": 5}}
made = shared.prepare(directory / "shared", "laptop", "", ["*"], settings=toy)
families = "BPE", "BLT entropy 4"
planned = [points.with_steps(scaling.family_point(made, f, 0), 30) for f in families]
with study.guarded():
    assert points.run(planned, directory / "points", 1) == []
rows = [points.read(p, directory / "points") for p in planned]
out = directory / "out"
out.mkdir()
pages.write_csv(out / "results.csv", rows)
scaling.report(rows, out)
"""
    environ = dict(environment(), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", script]
    first, second = (tmp_path / "points" / name for name in ("BPE-0", "BLT_entropy_4-0"))
    with subprocess.Popen(command, env=environ, start_new_session=True) as process:
        deadline = time.monotonic() + 500
        while not (second / "blt").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    finished = (first / "result.json").stat().st_mtime_ns
    assert not (second / "result.json").exists()
    done = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (first / "result.json").stat().st_mtime_ns == finished
    assert "BPE-0" not in done.stdout and "BLT_entropy_4-0" in done.stdout
    found = {r["family"]: r for r in pages.read_csv(tmp_path / "out" / "results.csv")}
    assert set(found) == {"BPE", "BLT entropy 4"}
    assert found["BLT entropy 4"]["patch_bytes"] == pytest.approx(4, rel=0.1)
    assert all(r["training_bytes"] > 0 and r["bits_per_byte"] < 8.1 for r in found.values())
    assert (tmp_path / "out" / "curves.png").exists()
