"""The benchmark of byte-ifying, as it is run, small: its page, and that nothing is done twice."""

import json
import subprocess
import sys

import pytest

from bltjax.data import tokenizer
from tests import llamas, processes

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
    options = dict(cwd=processes.ROOT, env=processes.environment(), capture_output=True, text=True)
    first = subprocess.run(command, **options)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout.splitlines()[-1])
    assert found["source"] > 0 and set(found["last"]) == {"teacher", "frozen", "random"}
    assert all(row["step"] == 4 for row in found["last"].values())
    page = (tmp_path / "out" / "README.md").read_text()
    for name in ("with a teacher", "random numbers", "the source", "curves.png"):
        assert name in page
    again = subprocess.run(command, **options)
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert "blt step" not in again.stdout
