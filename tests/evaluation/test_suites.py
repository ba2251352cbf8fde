"""What evaluate measures beside files: records with languages, suites, samples, harness tasks."""

import functools
import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from bltjax import cli
from bltjax.checkpoints.weights import Lengths
from bltjax.commands import evaluate
from bltjax.config import BLTConfig, PatchingConfig, TokenModelConfig
from bltjax.evaluation import files, suites
from bltjax.evaluation.characters import TASKS
from bltjax.evaluation.noise import KINDS
from bltjax.evaluation.patch_use import DISTURBED
from bltjax.patching.boundaries import patch_starts
from bltjax.vocabulary import encode
from tests.commands.test_score import FakeModel, run
from tests.evaluation.fakes import Speller

space_starts = functools.partial(patch_starts, PatchingConfig("space"))

ASKED = dict(
    kind="auto", field="", data=None, suites=[], samples=0, tasks=[], row_bytes=None, max_bytes=None
)
ASKED |= dict(patch_use_rows=0, limit=None, words=None, tasks_path=None, noise=None)


@pytest.fixture
def answers(monkeypatch):
    """What the flags make of a model, and what it was asked."""
    model = Speller()

    def ask(**flags):
        monkeypatch.setattr(cli, "open_model", lambda: model)
        return evaluate.run(SimpleNamespace(**(ASKED | flags))), model

    return ask


def test_the_use_of_patches_is_measured_on_even_shares_of_the_sources(answers, tmp_path, capsys):
    for source in ("a", "b"):
        (tmp_path / source).mkdir()
        (tmp_path / source / "text").write_text(source * 200)
    found = dict.fromkeys(DISTURBED, 0.125) | dict(another_row=None, bits_per_byte=1.0, bytes=9)
    asked = []
    _, model = answers(data=str(tmp_path))
    model.config, model.lengths = BLTConfig(), Lengths(row_bytes=64)
    model.patch_use = lambda *given: asked.append(given) or found
    result, _ = answers(data=str(tmp_path), patch_use_rows=3)
    assert result["patch_use"] == found
    assert asked == [([b"a" * 96, b"b" * 96], 3, 64)]
    line = capsys.readouterr().out.splitlines()[-1]
    assert "0.1250 zeroed" in line and "another" not in line and "9 bytes" in line
    answers(data=str(tmp_path), patch_use_rows=3, max_bytes=20, row_bytes=32)
    assert asked[1] == ([b"a" * 10, b"b" * 10], 3, 32)
    model.config = TokenModelConfig()
    assert "patch_use" not in answers(data=str(tmp_path), patch_use_rows=3)[0]
    assert len(asked) == 2


def test_lines_are_documents_with_a_source_and_a_language(tmp_path, capsys):
    """Files of lines at the top are sources; a file of text stays one document."""
    lines = [
        json.dumps(dict(text="un deux", lang="fr")),
        "not JSON",
        json.dumps(dict(content="one", language="en")),
        json.dumps(dict(text="", lang="fr")),
    ]
    with gzip.open(tmp_path / "mixed.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "more.jsonl").write_text(json.dumps(dict(text="trois", lang="fr")) + "\n")
    (tmp_path / "plain.txt").write_text("plain")
    result = files.evaluate(FakeModel(), tmp_path)
    sizes = {n: (s["documents"], s["num_bytes"]) for n, s in result["sources"].items()}
    assert sizes == {"mixed": (3, 10), tmp_path.name: (1, 5), "deep": (1, 5)}
    assert (result["documents"], result["num_bytes"]) == (5, 20)
    sizes = {n: (s["documents"], s["num_bytes"]) for n, s in result["languages"].items()}
    assert sizes == {"en": (1, 3), "fr": (3, 12)}
    french = result["languages"]["fr"]
    assert french["bits_per_byte"] == pytest.approx(0.5) and french["xz_bits_per_byte"] is None
    texts = (b"un deux", b"trois", b"")
    patches = sum(int(space_starts(encode(text))[:-1].sum()) for text in texts)
    assert french["mean_patch_bytes"] == pytest.approx((12 + 2 * 3) / patches)
    assert result["unreadable"] == ["mixed.jsonl.gz:line 2: not JSON: Expecting value"]
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out if line] == [
        "source", "deep", "mixed", tmp_path.name, "all", "language", "en", "fr",
    ]  # fmt: skip


def test_suite_of_characters(answers, tmp_path, capsys):
    result, model = answers(suites=["characters"], limit=2)
    assert list(result["characters"]["tasks"]) == list(TASKS)
    assert result["characters"]["exact_match"] == 0.0
    assert len(model.asked[0][0]) == 2 * len(TASKS)
    assert len(capsys.readouterr().out.splitlines()) == len(TASKS) + 3
    (tmp_path / "words").write_bytes("früh spät\nheute morgen\n".encode() + b"\xff")
    answers(suites=["characters"], limit=1, words=str(tmp_path / "words"))
    spelled = model.asked[1][0][0].rpartition('"')[0].rpartition('"')[2]
    assert spelled in ("früh", "spät", "heute", "morgen")
    words = ("na\xefve", "caf\xe9", "stra\xdfe", "gr\xfcn", "\xe9t\xe9")
    (tmp_path / "words").write_bytes("\n".join(words).encode("latin-1"))  # each byte is kept
    answers(suites=["characters"], limit=1, words=str(tmp_path / "words"))
    spelled = model.asked[2][0][0].rpartition('"')[0].rpartition('"')[2]
    assert spelled.encode("utf-8", "surrogateescape") in [w.encode("latin-1") for w in words]


def test_suite_of_noise_on_any_text(answers, tmp_path, capsys):
    (tmp_path / "text").write_text(" ".join(f"word{i} of {i * i}" for i in range(400)))
    result, _ = answers(data=str(tmp_path), suites=["noise"], limit=5)
    assert result["documents"] == 1 and result["noise"]["clean"]["items"] == 5
    assert list(result["noise"]["noisy"]) == list(KINDS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["chance", "0.2500"]
    assert lines[-2].split()[:3] == ["mean", "with", "noise"]
    assert lines[-7].split()[0] == "antspeak" and len(lines[-7].split()) == 5


def test_samples_and_tasks_of_the_harness(answers, monkeypatch, capsys):
    result, model = answers(samples=3)
    assert result["samples"]["samples"] == 3 and model.asked[0][0] == [b""] * 3
    assert model.asked[0][1]["temperature"] == 1.0
    assert "3 samples, 0 bytes: 100.0% are valid UTF-8" in capsys.readouterr().out
    harness = SimpleNamespace(run_tasks=lambda *a, **k: {"t": {"acc": 0.25, "given": len(k)}})
    monkeypatch.setitem(sys.modules, "bltjax.evaluation.harness", harness)
    result, _ = answers(tasks=["t"], noise="drop:prompt")
    assert result["tasks"]["t"] == dict(acc=0.25, given=2)
    assert "0.2500" in capsys.readouterr().out


def test_noise_of_tasks_is_a_kind_and_a_place(monkeypatch):
    seen = []
    harness = SimpleNamespace(run_tasks=lambda *a, **noise: seen.append(noise) or {})
    monkeypatch.setitem(sys.modules, "bltjax.evaluation.harness", harness)
    for given in (None, "drop", "upper:prompt"):
        suites.harness_suite(Speller(), ["t"], None, None, given)
    assert seen == [
        {},
        dict(noise="drop", noise_where="both"),
        dict(noise="upper", noise_where="prompt"),
    ]


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--suites=noise"], "--suites=noise makes its items of text: give --data=PATH"),
        (["--suites=characters,noize"], "--suites=noize is none of characters, noise"),
        ([], "or --suites, --samples or --tasks"),
    ],
)
def test_wrong_parts_are_one_line(arguments, wanted):
    code, out, err = run("evaluate", "--checkpoint=DIR", *arguments)
    assert code == 2 and out == [] and len(err) == 1 and wanted in err[0]
