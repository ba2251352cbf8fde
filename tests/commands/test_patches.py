"""The command patches: what it counts, prints, writes and refuses."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bltjax
from bltjax import cli
from bltjax.commands import patches
from bltjax.evaluation.patches import tables
from bltjax.evaluation.patches import view as patch_view
from bltjax.patching.boundaries import RULES
from bltjax.runtime import terminal
from bltjax.vocabulary import encode
from tests import directories, processes
from tests.evaluation.patches.test_pictures import Page

pytestmark = pytest.mark.long  # one interpreter will do

ROOT = Path(__file__).parents[2]
TEXT = "Größe & <b>\n".encode() + b"\xff\0 some text of a few words, 2 + 2 = 4.\n" * 3
NEEDS_MATPLOTLIB = "needs matplotlib: pip install 'bltjax[plots]'"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return directories.hub(tmp_path_factory.mktemp("model") / "hf", "hf_A_1b_like")


@pytest.fixture(scope="module")
def loaded(directory):
    return bltjax.load(directory)


@pytest.fixture
def model(loaded, monkeypatch):
    """The golden model, as the command opens it; what a test sets of it is undone."""
    for name in ("patching", "config", "entropy_config"):
        monkeypatch.setattr(loaded, name, getattr(loaded, name))
    monkeypatch.setattr(cli, "open_model", lambda: loaded)
    return loaded


def chosen(path, **flags):
    unset = dict(png=None, html=None, threshold=None, max_bytes=None, color="never")
    unset |= dict(kind="auto", field="")
    return SimpleNamespace(**unset | dict(input=str(path)) | flags)


def row(text):
    """ids [1, 512] of BOS + text + EOS, of one shape for all, so that little is compiled."""
    ids = encode(text)
    return np.pad(ids, (0, 512 - len(ids)))[None]


def cut(model, text):
    """The text cut by the model's own patches, byte by byte."""
    lengths = model.patch_lengths(row(text))[0]
    owner = np.repeat(np.arange(len(lengths)), lengths)[1 : len(text) + 1]
    return [
        bytes(b for b, o in zip(text, owner, strict=True) if o == number)
        for number in dict.fromkeys(owner.tolist())
    ]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("text", [TEXT, b"a", b""])
def test_a_view_has_the_models_patches_and_entropies(model, rule, text):
    model.patching = dataclasses.replace(model.patching, rule=rule, threshold_add=-0.1)
    if rule == "monotonic":
        model.patching = dataclasses.replace(model.patching, threshold=0.02)
    (view,) = patch_view.look(model, [text])
    assert view.patches == cut(model, text) and view.num_trained == len(view.starts)
    expected = model.entropies(row(text))[0, : len(text)]
    np.testing.assert_allclose(view.entropies, expected, rtol=0, atol=1e-5)
    if not RULES[rule].needs_entropies:
        assert view.levels is None
    else:
        forced = RULES[rule].num_forced - 1  # bytes; BOS is the first position
        above = np.flatnonzero(view.entropies > view.levels)
        assert view.starts[forced:].tolist() == [s for s in above if s >= forced]
        assert len(text) < 2 or len(view.starts) > forced


def test_a_text_does_not_depend_on_its_company(model):
    texts = [TEXT, b"", b"short", TEXT[:70]]
    for text, view in zip(texts, patch_view.look(model, texts), strict=True):
        assert view.patches == cut(model, text) and view.text == text


def test_a_file_is_shown_and_counted(model, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    result = patches.run(chosen(path, html=str(tmp_path / "page.html")))
    pieces = cut(model, TEXT)
    printed = capsys.readouterr().out
    assert printed.startswith("|".join(map(terminal.printable, pieces)))
    lengths = Counter(map(len, pieces))
    assert result["histogram"] == {str(n): lengths[n] for n in sorted(lengths)}
    assert (result["bytes"], result["patches"]) == (len(TEXT), len(pieces))
    assert result["mean_patch_bytes"] == len(TEXT) / len(pieces)
    assert result["trained"]["patches"] == len(pieces)
    assert result["threshold"] == pytest.approx(directories.THRESHOLD)
    expected = model.entropies(row(TEXT))[0, : len(TEXT)].mean()
    assert result["mean_entropy"] == pytest.approx(expected, rel=1e-5)
    assert result["files"][0]["name"] == str(path) and "own threshold" not in printed
    bars = printed.split("bytes of a patch\n")[1].splitlines()
    assert bars[0].split()[0] == "1" and bars[0].split()[-2] == str(lengths[1])
    assert Page((tmp_path / "page.html").read_text()).patches == pieces


def test_another_threshold_is_reported_beside_the_models_own(model, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    own = len(cut(model, TEXT))
    result = patches.run(chosen(path, threshold=0.0))
    assert result["patches"] == len(TEXT) and result["threshold"] == 0.0
    assert result["trained"]["patches"] == own < len(TEXT)
    assert result["trained"]["mean_patch_bytes"] == len(TEXT) / own
    assert result["trained"]["threshold"] == pytest.approx(directories.THRESHOLD)
    assert f"{own} patches, mean {len(TEXT) / own:.3f} bytes" in capsys.readouterr().out
    assert model.patching.threshold == pytest.approx(directories.THRESHOLD)  # as it was
    assert patches.run(chosen(path, threshold=99.0))["patches"] == 1


def test_rules_without_entropies_need_no_entropy_model(model, tmp_path, capsys):
    model.patching = dataclasses.replace(model.patching, rule="space")
    model.entropy_config = None
    path = tmp_path / "text.txt"
    path.write_bytes(b"two words")
    result = patches.run(chosen(path, html=str(tmp_path / "page.html")))
    assert capsys.readouterr().out.startswith("two |words\n")
    assert result["mean_entropy"] is None and result["threshold"] is None
    assert result["trained"] == dict(threshold=None, patches=2, mean_patch_bytes=4.5)
    assert "nats" not in (tmp_path / "page.html").read_text()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    for name, data in {
        "de/one": "Größe und Länge, ".encode() * 9,
        "de/deep/two": b"kurz",
        "bin/x": bytes(range(256)),
        "top.txt": b"a file by itself\n",
        "empty": b"",
        ".hidden": b"h" * 999,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "bin" / "gone").symlink_to(root / "missing")
    return root


@pytest.mark.parametrize("max_bytes, read_bytes", [(None, 2_000_000), (50, 1)])
def test_a_folder_is_a_table(model, folder, max_bytes, read_bytes, monkeypatch, capsys):
    monkeypatch.setattr(tables, "READ_BYTES", read_bytes)
    result = patches.run(chosen(folder, max_bytes=max_bytes))
    counted = {}
    share = max_bytes and max_bytes // 4
    for name in ("de/deep/two", "de/one", "bin/x", "top.txt", "empty"):
        text = (folder / name).read_bytes()
        seen = counted.setdefault(name.split("/")[0], SimpleNamespace(files=0, patches=[], nats=[]))
        text = text[: share and share - sum(map(len, seen.patches))]
        seen.files += 1
        seen.patches += cut(model, text)
        seen.nats += model.entropies(row(text))[0, : len(text)].tolist()
    assert {found["name"] for found in result["files"]} == set(counted)
    for found in result["files"]:
        expected = counted[found["name"]]
        sizes = list(map(len, expected.patches))
        assert (found["files"], found["bytes"]) == (expected.files, sum(sizes))
        assert found["patches"] == len(sizes)
        if sizes:
            assert found["mean_patch_bytes"] == sum(sizes) / len(sizes)
            assert found["mean_entropy"] == pytest.approx(np.mean(expected.nats), rel=1e-5)
        else:
            assert found["mean_patch_bytes"] is None and found["mean_entropy"] is None
    means = [found["mean_patch_bytes"] or 0 for found in result["files"]]
    assert means == sorted(means, reverse=True)
    everything = [patch for seen in counted.values() for patch in seen.patches]
    assert result["patches"] == len(everything) == sum(result["histogram"].values())
    assert result["bytes"] == sum(map(len, everything))
    assert result["unreadable"] == ["bin/gone: a link that leads nowhere"]
    printed = capsys.readouterr()
    table = [line.split() for line in printed.out.splitlines()[:6]]
    assert table[0] == ["source", "files", "bytes", "patches", "bytes/patch", "nats/byte"]
    assert [line[0] for line in table[1:]] == [*(found["name"] for found in result["files"]), "all"]
    assert table[5][1:4] == ["5", str(result["bytes"]), str(result["patches"])]
    assert "bin/gone" in printed.err


def test_what_cannot_be_done_is_told(model, folder, tmp_path, monkeypatch):
    def told(match, error=ValueError, path=folder / "top.txt", **flags):
        with pytest.raises(error, match=match):
            patches.run(chosen(path, **flags))

    told("--html shows one text", path=folder, html=str(tmp_path / "x"))
    told("--png=.*: make .*/none", png=str(tmp_path / "none" / "x.png"))
    told("--html=.* is a folder: give a file in it", html=str(tmp_path))
    told("--html=.* is in a bucket: give a file on", html="gs://texts/x.html")
    monkeypatch.setattr(patches.os, "access", lambda *_: False)  # root may write anywhere
    told("--html=.* is not writable: choose another", html=str(tmp_path / "x.html"))
    told("--threshold=nan must be a finite number", threshold=float("nan"))
    told("no file below .*empty_folder", path=_made(tmp_path / "empty_folder"))
    told("nothing at .*missing", OSError, path=tmp_path / "missing")
    monkeypatch.setattr(patches, "MAX_SHOWN_BYTES", 5)
    told("more than the 5 bytes that can be shown: give --max_bytes=5")
    assert patches.run(chosen(folder / "top.txt", max_bytes=5))["bytes"] == 5
    model.patching = dataclasses.replace(model.patching, rule="space")
    told("'space' has no threshold: leave out --threshold=1.0", threshold=1.0, max_bytes=5)
    model.patching = dataclasses.replace(model.patching, rule="entropy")
    model.entropy_config = None
    told("needs an entropy model and there is none: give --entropy_model=DIR", max_bytes=5)
    model.config = None
    told("entropy model alone, it has no patches", max_bytes=5)


def _made(path):
    path.mkdir()
    return path


def test_a_missing_matplotlib_is_told_before_anything_is_loaded(model, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(cli, "open_model", lambda: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"--png needs matplotlib: pip install 'bltjax\[plots\]'"):
        patches.run(chosen(folder / "top.txt", png=str(folder / "x.png")))


def test_colours_are_for_terminals(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert patches._colour("auto") and patches._colour("always") and not patches._colour("never")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not patches._colour("auto") and patches._colour("always")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: False))
    assert not patches._colour("auto")


# ---- as a process


def run(*arguments, stdin=b""):
    return subprocess.run(
        [sys.executable, "-m", "bltjax.patches", *map(str, arguments)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        timeout=120,
        env=processes.environment(),
    )


def test_the_command_prints_json_in_the_last_line(directory, model, tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    png = tmp_path / "x.png"
    done = run(
        *(f"--checkpoint={directory}", "--input=-", f"--png={png}", "--color=always"),
        *("--max_bytes=60",),
        stdin=TEXT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\x1b[30;46m") and b"wrote" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1], parse_constant=pytest.fail)
    assert result["bytes"] == 60 and result["patches"] == len(cut(model, TEXT[:60]))
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--checkpoint=DIR"], "give --checkpoint=DIR and --input=FILE"),
        (["stray"], "unexpected argument 'stray'"),
        (["--checkpoint=DIR", "--input=/no/such/file"], "/no/such/file"),
        (["--color=blue"], "blue"),
    ],
)
def test_wrong_input_is_one_line(arguments, wanted):
    done = run(*arguments)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2 and done.stdout == b""
    assert len(lines) == 1 and lines[0].startswith("error: ") and wanted in lines[0]


def test_help_answers_without_loading_jax_or_matplotlib():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['patches', '--help']\n"
        "try:\n    runpy.run_module('bltjax.patches', run_name='__main__', alter_sys=True)\n"
        "except SystemExit:\n    pass\n"
        "print([m for m in ('jax', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr
    assert all(f"--{name}:" in result.stdout for name in ("checkpoint", "png", "html", "threshold"))
