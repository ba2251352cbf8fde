"""Cycles that libtpu writes into a program, in a text that is small enough to add up by hand."""

import pytest

from bltjax.costs import compiler_cycles
from bltjax.costs.chips import CHIPS
from tests import processes

TEXT = (processes.ROOT / "tests/golden_data/hlo/tpu_cycles.txt").read_text()
ROUNDS = 10  # from 2 to 12
ROTARY, LINEAR, COPY = ROUNDS * 700, 5000, 30  # the loop, the costlier branch, one without a source


def test_cycles_by_the_file_that_they_are_spent_on():
    found = compiler_cycles.read_cycles(TEXT)
    assert found.parts == {
        "ops/rotary.py": ROTARY,
        "model/parameters.py": LINEAR,
        compiler_cycles.NO_SOURCE: COPY,
    }
    assert found.total == ROTARY + LINEAR + COPY
    assert found.uncounted == {"kernel": ROUNDS, "all-reduce": 1, "gather": 1}


def test_a_loop_that_ends_itself_counts_once():
    found = compiler_cycles.read_cycles(TEXT.replace("constant(12)", "parameter(1)"))
    assert found.parts["ops/rotary.py"] == 700 and found.uncounted["kernel"] == 1


def test_seconds_and_utilisation_of_a_chip(capsys):
    chip = CHIPS["v5e"]
    found = compiler_cycles.report(TEXT, 1e6, chip)
    seconds = (ROTARY + LINEAR + COPY) / 1.5e9
    assert found["seconds"] == pytest.approx(seconds)
    assert found["mfu"] == pytest.approx(1e6 / 197e12 / seconds)
    assert list(found["part_seconds"]) == ["ops/rotary.py", "model/parameters.py", "no source"]
    for roofline, believed in ((0.9, found["mfu"]), (1e-9, 1e-9)):
        compiler_cycles.print_report(found, roofline)
        shown = capsys.readouterr().out
        assert f"at most {believed:.1%}" in shown and "10 x kernel" in shown
        assert ("that of the compiler's cycles" in shown) == (roofline == 0.9)


def test_other_compilers_write_none():
    without = TEXT.replace("estimated_cycles", "other")
    assert compiler_cycles.report(without, 1e6, CHIPS["v5e"]) is None
    assert compiler_cycles.report(TEXT, 1e6, CHIPS["h100"]) is None  # of no known clock
