"""Progress bars on a terminal and in a log."""

import io
import re

import pytest

from bltjax.runtime import progress
from bltjax.runtime.progress import format_seconds, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_line_that_ends_at_the_total(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar("writing", 4_000_000) as bar:
        bar.update(1_000_000)
        bar.update(3_000_000)
    shown = stream.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\n") and shown.startswith("\rwriting:   0%")
    assert re.search(r"\rwriting: 100%.* 4\.00M/4\.00M .*B/s\]\n$", shown)


def test_a_log_gets_no_line_of_a_short_job_and_few_of_a_long_one(monkeypatch, capsys):
    with progress_bar("writing", 10) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    with progress_bar("writing", 10) as bar:
        bar.update(5)
        bar.update(5)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("writing: ") for line in lines)
    assert [line.split("|")[0].split()[-1] for line in lines[:3]] == ["0%", "50%", "100%"]


@pytest.mark.parametrize("total, done", [(0, 0), (0, 5), (5, 9)])
def test_odd_totals_are_no_error(total, done, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    with progress_bar("writing", total) as bar:
        bar.update(done)
    assert f"{done:.2f}B" in capsys.readouterr().err


def test_a_bar_that_is_not_wanted_shows_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    with progress_bar("writing", 10, shown=False) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_durations():
    assert [format_seconds(s) for s in (9.9, 187, 7500)] == ["9s", "3m07s", "2h05m"]
