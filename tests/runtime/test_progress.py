"""Progress lines."""

import io
import re

import pytest

from bltjax.runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_line_that_ends_at_the_total():
    stream = Terminal()
    progress = Progress("writing", 4_000_000, stream=stream)
    progress(1_000_000)
    progress(3_000_000)
    progress.close()
    shown = stream.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\n")
    assert re.search(r"\rwriting \[#{5} {15}\]  25% 1 MB of 4 MB, .*B/s, eta \d+:\d\d", shown)
    assert re.search(r"\rwriting \[#{20}\] 100% 4 MB of 4 MB, .*eta 0:00\n$", shown)


def test_a_log_gets_no_line_of_a_short_job_and_few_of_a_long_one():
    stream = io.StringIO()
    progress = Progress("writing", 10, stream=stream)
    progress(10)
    progress.close()
    assert stream.getvalue() == ""
    progress = Progress("writing", 10, every=0.0, stream=stream)
    progress(5)
    progress(5)
    progress.close()
    assert [line.split("]")[1][:5] for line in stream.getvalue().splitlines()] == ["  50%", " 100%"]


@pytest.mark.parametrize("total, done", [(0, 0), (0, 5), (5, 9)])
def test_odd_totals_are_no_error(total, done):
    stream = io.StringIO()
    Progress("writing", total, every=0.0, stream=stream)(done)
    assert "100%" in stream.getvalue()
