"""The commands score and evaluate: what they print, read and refuse, around a model of ours."""

import functools
import gzip
import json
import lzma
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bltjax
from bltjax.commands import score as score_command
from bltjax.config import BLTConfig, PatchingConfig
from bltjax.evaluation import files as evaluate_command
from bltjax.evaluation.patch_use import DISTURBED
from bltjax.evaluation.patches.view import look
from bltjax.evaluation.score import Score
from bltjax.evaluation.texts import find_texts
from bltjax.patching.boundaries import patch_starts
from bltjax.vocabulary import encode
from tests import directories, processes

space_starts = functools.partial(patch_starts, PatchingConfig("space"))

ROOT = Path(__file__).parents[2]

# In the place of bltjax.api, in a process of its own: the commands are about what is around it.
STAND_IN = """
import atexit, runpy, sys, types
def load(path, *, entropy_model, adapter, dtype, bf16_compat, on_progress):
    if path == "launch":
        raise ValueError("no weights in launch:\\n* config.json")
    print("loaded", path, entropy_model, dtype, file=sys.stderr)
    from tests.commands.test_score import FakeModel
    model = FakeModel()
    atexit.register(lambda: print([options for _, options in model.calls], file=sys.stderr))
    return model
sys.modules["bltjax.api"] = types.SimpleNamespace(load=load)
sys.modules["bltjax.checkpoints.formats"] = types.SimpleNamespace(stored_bytes=lambda directory: 0)
import bltjax
import bltjax.checkpoints
bltjax.api = sys.modules["bltjax.api"]
bltjax.checkpoints.formats = sys.modules["bltjax.checkpoints.formats"]
sys.argv = sys.argv[1:]
runpy.run_module("bltjax." + sys.argv[0], run_name="__main__", alter_sys=True)
"""


class FakeModel:
    """Half a bit for each byte, and a patch for each word."""

    config, entropy_config, patching = BLTConfig(), None, PatchingConfig(rule="space")

    def __init__(self):
        self.calls = []

    def score(self, documents, on_progress=lambda num_bytes: None, **options):
        self.calls.append((list(documents), options))
        return [self._score(document, on_progress) for document in documents]

    def patch_use(self, documents, num_rows, row_bytes):
        use = dict.fromkeys(DISTURBED, 0.25)
        return use | dict(bits_per_byte=0.5, bytes=sum(map(len, documents)))

    def _score(self, document, on_progress):
        on_progress(len(document))
        nats = 0.5 * math.log(2) * len(document)
        num_patches = int(space_starts(encode(document))[:-1].sum())
        return Score(nats, len(document), num_patches, 0.5 if document else math.nan)


def run(name, *arguments, stdin=b""):
    """The command in a process of its own: (exit code, stdout lines, stderr lines)."""
    result = subprocess.run(
        [sys.executable, "-c", STAND_IN, name, *map(str, arguments)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        timeout=120,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
    )
    return result.returncode, *(
        text.decode().splitlines() for text in (result.stdout, result.stderr)
    )


# ---- score


def test_score_prints_a_table_and_json_in_the_last_line():
    code, out, err = run(
        *("score", "--checkpoint=docs", "--entropy_model=tests", "--dtype=bfloat16", "--input=-"),
        *("--lines", "--show_patches"),
        stdin=b"two words\n\n\xc3\xa9 \xff\x1b[1m\n",
    )
    assert code == 0 and err == ["loaded docs tests bfloat16", "[{}]"]
    assert out[0].split() == ["document", "bytes", "patches", "nats", "bits/byte"]
    assert out[1].split() == ["1", "9", "3", "3.119", "0.5000"]
    assert out[2].split() == ["2", "0", "2", "0.000", "-"]
    assert out[4].split()[:2] == ["all", "17"]
    assert out[5:12] == ["", "document 1:", "two |words", "", "document 2:", "", ""]
    assert out[13].startswith("é |\\xff\\x1b") and "\x1b" not in "".join(out)
    result = json.loads(out[-1], parse_constant=pytest.fail)
    assert [d["num_bytes"] for d in result["documents"]] == [9, 0, 8]
    assert result["documents"][1]["bits_per_byte"] is None
    assert result["documents"][0]["num_patches"] == 3
    assert result["nats"] == pytest.approx(8.5 * math.log(2)) and result["num_bytes"] == 17
    assert result["bits_per_byte"] == pytest.approx(0.5)


def test_a_file_is_one_document_unless_its_lines_are(tmp_path, monkeypatch):
    path = tmp_path / "text"

    def read(text, lines=False, **flags):
        path.write_bytes(text)
        options = dict(kind="auto", field="", max_bytes=None) | flags
        chosen = SimpleNamespace(input=str(path), lines=lines, **options)
        return score_command.read_documents(chosen)[0]

    assert read(b"one\r\n\ntwo") == [b"one\r\n\ntwo"]
    assert read(b"one\r\n\ntwo", lines=True) == [b"one\r", b"", b"two"]
    assert read(b"one\r\n\ntwo", lines=True, max_bytes=7) == [b"one\r", b"", b"t"]
    assert read(gzip.compress(b"one\ntwo"), lines=True) == [b"one", b"two"]
    assert read(b"\n", lines=True) == [b""]
    assert read(b"") == [b""]
    assert read(b"", lines=True) == []
    path = tmp_path / "a.jsonl"
    assert read(b'{"text": "t"}\n{}') == [b"t"]
    assert read(b'{"text": "t"}\n{}', lines=True) == [b'{"text": "t"}', b"{}"]
    result = score_command.score(FakeModel(), [])
    assert result == dict(documents=[], nats=0.0, num_bytes=0, bits_per_byte=None)


@given(st.one_of(st.binary(max_size=80), st.text("ab \n", max_size=150).map(str.encode)))
def test_patches_are_the_document_cut_where_they_start(document):
    (view,) = look(FakeModel(), [document])
    assert b"".join(view.patches) == document and all(view.patches)
    starts = np.flatnonzero(space_starts(encode(document)))
    assert len(view.patches) == np.count_nonzero((starts >= 1) & (starts <= len(document)))


# ---- evaluate


@pytest.fixture
def corpus(tmp_path):
    """Sources b and a, two files at the top, and what is to be left out."""
    root = tmp_path / "corpus"
    for name, data in {
        "b/deep/one.txt": b"b" * 3000,
        "b/two": os.urandom(1500),
        "a/empty": b"",
        "a/three.bin": b"\x00\xff" * 50,
        "z.txt": b"top",
        "c.txt": b"level",
        ".hidden": b"h" * 9999,
        "a/.git/config": b"h" * 9999,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "a" / "gone").symlink_to(root / "missing")
    os.mkfifo(root / "b" / "pipe")
    return root


def test_evaluate_measures_every_source(corpus, capsys):
    model = FakeModel()
    result = evaluate_command.evaluate(model, corpus, row_bytes=64)
    assert list(result["sources"]) == ["a", "b", "corpus"]
    assert [s["documents"] for s in result["sources"].values()] == [2, 2, 2]
    assert [s["num_bytes"] for s in result["sources"].values()] == [100, 4500, 8]
    assert result["documents"] == 6 and result["num_bytes"] == 4608
    assert result["nats"] == pytest.approx(2304 * math.log(2))
    assert result["bits_per_byte"] == pytest.approx(0.5)
    contents = [b"level", b"top"]
    assert model.calls[0][0][4:] == contents and model.calls[0][1] == dict(row_bytes=64)
    patches = sum(int(space_starts(encode(data))[:-1].sum()) for data in contents)
    assert result["sources"]["corpus"]["mean_patch_bytes"] == (8 + 4) / patches
    xz = len(lzma.compress(b"".join(model.calls[0][0][2:4]), preset=9))
    assert result["sources"]["b"]["xz_bits_per_byte"] == 8 * xz / 4500
    sizes = [s["num_bytes"] * s["xz_bits_per_byte"] for s in result["sources"].values()]
    assert result["xz_bits_per_byte"] == pytest.approx(sum(sizes) / 4608)
    gone, pipe = "a/gone: a link that leads nowhere", "b/pipe: no regular file, but a pipe,"
    assert result["unreadable"][0] == gone and result["unreadable"][1].startswith(pipe)
    assert len(result["unreadable"]) == 2
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert rows[0] == ["source", "documents", "bytes", "bits/byte", "bytes/patch", "xz"]
    assert [row[0] for row in rows[1:]] == ["a", "b", "corpus", "all"]
    assert rows[2][1:4] == ["2", "4500", "0.5000"]
    told, hidden = printed.err.splitlines()
    assert told.startswith(f"could not be read: {gone}; {pipe}")
    assert hidden.startswith("left out of data: 2 files, 19998 bytes whose names")
    assert result["left_out"] == [hidden]


def test_evaluate_reads_a_part_of_the_files_at_a_time(corpus, monkeypatch, capsys):
    whole = evaluate_command.evaluate(FakeModel(), corpus)
    monkeypatch.setattr(evaluate_command, "READ_BYTES", 100)
    model = FakeModel()
    assert evaluate_command.evaluate(model, corpus) == whole
    assert len(model.calls) == 4


def test_files_that_vanish_while_others_are_read_are_named(corpus, monkeypatch, capsys):
    def score(self, documents, **options):
        (corpus / "b" / "two").unlink(missing_ok=True)
        return [self._score(document, lambda num_bytes: None) for document in documents]

    monkeypatch.setattr(evaluate_command, "READ_BYTES", 1)
    monkeypatch.setattr(FakeModel, "score", score)
    result = evaluate_command.evaluate(FakeModel(), corpus)
    gone = f"b/two: {corpus / 'b' / 'two'} is gone since the files were listed: put it back"
    assert result["documents"] == 5 and result["unreadable"][2].startswith(gone)
    assert gone in capsys.readouterr().err


def test_max_bytes_is_stated(corpus, capsys):
    sizes = dict(a=100, b=4500, corpus=8)
    for limit in (3, 20, 300, 14_000):
        result = evaluate_command.evaluate(FakeModel(), corpus, max_bytes=limit)
        read = {name: found["num_bytes"] for name, found in result["sources"].items()}
        assert read == {name: min(size, limit // 3) for name, size in sizes.items()}
        assert result["bytes_per_source"] == limit // 3
        assert f"at most {limit // 3} bytes of each source" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"max_bytes=2 is less than a byte for each of 3 sources"):
        evaluate_command.evaluate(FakeModel(), corpus, max_bytes=2)


def test_files_beside_folders_have_the_name_of_the_folder(corpus, monkeypatch, capsys):
    (corpus / "corpus").mkdir()
    (corpus / "corpus" / "x").write_bytes(b"inside")
    monkeypatch.chdir(corpus)
    for path in (corpus, ".", "./", f"{corpus}/*", "*", "../corpus"):
        result = evaluate_command.evaluate(FakeModel(), path)
        sizes = {name: found["num_bytes"] for name, found in result["sources"].items()}
        assert sizes == {"a": 100, "b": 4500, "corpus": 6, "./corpus": 8}


def test_no_two_sources_have_one_name(tmp_path):
    names = ["a.jsonl", "a.parquet", "b/x.txt", "b.jsonl.gz", "c", "c.ndjson", "d.jsonl", "e.txt"]
    top = tmp_path / "top"
    for name in (*names, "top.jsonl"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    records = ["a.jsonl", "a.parquet", "b", "b.jsonl.gz", "d"]
    for path in (top, top / "*"):
        together = find_texts(path).sources
        assert together == sorted([*records, "c", "top", "top", "top.jsonl"])
        apart = find_texts(path, files_apart=True).sources
        assert apart == sorted([*records, "c", "c.ndjson", "e.txt", "top"])


def test_evaluate_of_one_file_and_of_none(corpus, capsys):
    result = evaluate_command.evaluate(FakeModel(), corpus / "z.txt")
    assert list(result["sources"]) == ["z.txt"] and result["num_bytes"] == 3
    with pytest.raises(ValueError, match=r"a/empty' hold no bytes"):
        evaluate_command.evaluate(FakeModel(), corpus / "a" / "empty")
    with pytest.raises(ValueError, match=r"no file below .*\.git.* 1 file, .* begin with a dot"):
        (corpus / "a" / ".git" / "config").rename(corpus / "a" / ".git" / ".config")
        evaluate_command.evaluate(FakeModel(), corpus / "a" / ".git")


def test_evaluate_prints_json_in_the_last_line(corpus):
    name = os.fsdecode(b"caf\xe9")  # no UTF-8
    (corpus / name).mkdir()
    (corpus / name / "x").write_bytes(b"")
    code, out, err = run("evaluate", "--checkpoint=docs", f"--data={corpus}", "--row_bytes=64")
    assert code == 0 and err[0] == "loaded docs None None" and "could not" in err[1]
    assert "left out of data: 2 files" in err[2] and err[3:] == ["[{'row_bytes': 64}]"]
    assert out[3].split()[:3] == ["caf\\xe9", "1", "0"]
    result = json.loads(out[-1], parse_constant=pytest.fail)
    assert result["patch_use"]["zeroed"] == 0.25
    assert result["documents"] == 7 and result["sources"][name]["bits_per_byte"] is None


# ---- both


@pytest.mark.parametrize(
    "name, arguments, wanted",
    [
        ("score", ["--checkpoint=docs"], "give --checkpoint=DIR and --input=FILE"),
        ("evaluate", ["--data=."], "give --checkpoint=DIR and --data=PATH"),
        ("score", ["--checkpoint=docs", "--input=/no/such/file"], "/no/such/file"),
        ("evaluate", ["--checkpoint=docs", "--data=/no/such/path"], "/no/such/path"),
        ("score", ["--checkpoint=launch", "--input=README.md"], "no weights in launch: * config"),
        ("evaluate", ["--checkpoint=launch", "--data=README.md"], "no weights in launch"),
        ("evaluate", ["--checkpoint=gone", "--data=README.md"], "no directory gone: give one with"),
        ("score", ["stray"], "unexpected argument 'stray'"),
        ("evaluate", ["stray"], "unexpected argument 'stray'"),
        ("score", ["--inputt=x"], "inputt"),
        ("score", ["--dtype=float8"], "float8"),
        ("evaluate", ["--row_bytes=7"], "row_bytes"),
    ],
)
def test_wrong_input_is_one_line(name, arguments, wanted):
    code, out, err = run(name, *arguments)
    assert code == 2 and out == []
    assert len(err) == 1 and err[0].startswith("error: ") and wanted in err[0]


@pytest.mark.parametrize("name", ["score", "evaluate"])
def test_help_answers_without_loading_jax(name):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{name}', '--help']\n"
        f"try:\n    runpy.run_module('bltjax.{name}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit:\n    pass\n"
        "print('jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert result.stdout.strip().endswith("False"), result.stdout + result.stderr
    assert "--checkpoint" in result.stdout and "--entropy_model" in result.stdout


@pytest.mark.long
def test_on_a_model_in_a_directory(tmp_path):
    """The commands as they are, on the golden model."""
    model = directories.hub(tmp_path / "model", "hf_A_1b_like")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_bytes(b"some text\xff")

    def command_of(name, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", f"bltjax.{name}", f"--checkpoint={model}", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=processes.environment(),
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    (expected,) = bltjax.load(model).score([b"some text\xff"])
    scored = command_of("score", f"--input={tmp_path / 'text' / 'a'}")
    assert scored["documents"][0]["nats"] == pytest.approx(expected.nats, rel=1e-5)
    evaluated = command_of("evaluate", f"--data={tmp_path / 'text'}", "--bf16_compat")
    assert evaluated["num_bytes"] == 10
    assert evaluated["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=0.1)
