"""The modules that users import are typed, and the types agree."""

import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.long
def test_mypy_finds_nothing():
    """A planted error, `row_bytes: str` in `TextModel.score`, is found."""
    command = [sys.executable, "-m", "mypy"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
