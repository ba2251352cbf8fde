"""The benchmark of byte-ifying, as it is run, small: its page, and that nothing is done twice."""

import json
import subprocess
import sys

import pytest

from bltjax.data import tokenizer
from tests import llamas, processes
from tests.processes import metrics

pytestmark = pytest.mark.slow


def test_the_page_has_every_arm_and_the_source(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra tokens")
    source = llamas.write(tmp_path / "source", vocab_size=300)
    text = b"patch byte latent patch byte latent x=1;\n" * 9
    (source / "tokenizer.json").write_text(tokenizer.train([text], 300).text)
    (tmp_path / "corpus").mkdir()
    for i in range(60):
        (tmp_path / "corpus" / f"{i}.txt").write_bytes(text)
    command = [sys.executable, "-m", "benchmarks.byteify", f"--source={source}"]
    command += [f"--corpus={tmp_path / 'corpus'}", f"--workdir={tmp_path / 'out'}", "--steps=4"]
    command += ["--row_bytes=128", "--measurements=2", "--validation_rows=4"]
    arms = ["teacher", "frozen", "random", "teacher-tokens"]
    command += [f"--arms={','.join(arms)}", "--vocabulary_steps=4"]
    options = dict(cwd=processes.ROOT, env=processes.environment(), capture_output=True, text=True)
    first = subprocess.run(command, **options)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout.splitlines()[-1])
    tokens, told = "the source, on rows of tokens", "the source, told where its tokens end"
    levels = found["source"]
    assert list(levels) == ["the source", tokens, told]
    assert levels["the source"] > 0 and levels[tokens] > levels[told] > 0
    assert list(found["last"]) == arms
    assert all(row["step"] == 4 for row in found["last"].values())
    page = (tmp_path / "out" / "README.md").read_text()
    for name in ("with a teacher", "random numbers", "the source", "curves.png"):
        assert name in page
    # Every patch is a token but BOS, EOS, and the two that a row begins with inside a document.
    shares = {arm: aligned_shares(tmp_path / "out" / arm) for arm in ("teacher", "teacher-tokens")}
    assert min(shares["teacher-tokens"]) > 0.85 > max(shares["teacher"]) > 0
    again = subprocess.run(command, **options)
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert "blt step" not in again.stdout


def aligned_shares(directory):
    return [line["aligned_share"] for line in metrics(directory, "blt") if "aligned_share" in line]


def test_arms_that_are_not_there_are_refused(tmp_path):
    command = [sys.executable, "-m", "benchmarks.byteify", "--source=x", "--corpus=x"]
    command += [f"--workdir={tmp_path / 'out'}", "--arms=teacher,tokens"]
    options = dict(cwd=processes.ROOT, env=processes.environment(), capture_output=True, text=True)
    found = subprocess.run(command, **options)
    assert found.returncode == 2
    assert "--arms=tokens: give some of teacher, words, " in found.stderr
