"""Chip-hours and cost of runs, against sums of their own and the page that shows them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bltjax.config import config_path, read_config
from bltjax.costs.chips import CHIPS, find_chip
from bltjax.costs.flops import flops_per_byte
from bltjax.costs.training_time import ASSUMED_MFU, StageWork, summary, work_of_stages
from tests.processes import ROOT

pytestmark = pytest.mark.long  # one interpreter will do


def config(name: str, **settings):
    return read_config(config_path(name), {k.replace("__", "."): v for k, v in settings.items()})


def test_a_run_reads_what_its_steps_read():
    run = config("blt_1b")
    work = work_of_stages(run)
    assert list(work) == ["entropy_model", "entropies", "blt"]
    assert work["blt"].num_bytes == 6000 * 1024 * 16_384 and work["blt"].steps == 6000
    assert work["entropy_model"].num_bytes == 100_000 * 64 * 8192
    forward = flops_per_byte(run.entropy_model, 8192)["total"]
    assert work["entropy_model"].flops_per_byte == 3 * forward
    assert work["entropies"] == StageWork(work["blt"].num_bytes, forward, None)
    assert work["blt"].flops_per_byte == 3 * flops_per_byte(run.blt, 16_384, 4.5)["total"]


def test_the_entropy_model_reads_no_more_than_its_own_steps():
    for num_bytes, read in ((1e10, 1e10), (1e12, 100_000 * 64 * 8192)):
        work = work_of_stages(config("blt_1b"), num_bytes)
        assert work["blt"].num_bytes == num_bytes and work["entropy_model"].num_bytes == read
        assert 0 <= work["blt"].steps * 1024 * 16_384 - num_bytes < 1024 * 16_384


def test_stages_that_do_not_run_cost_nothing():
    assert list(work_of_stages(config("entropy_100m"))) == ["entropy_model"]
    assert list(work_of_stages(config("blt_1b", stages=("blt",)))) == ["entropies", "blt"][::-1]
    static = config("blt_1b", stages=("blt",), patching__rule="static", patching__patch_size=4)
    assert list(work_of_stages(static)) == ["blt"]


def test_rows_of_tokens_hold_more_bytes():
    run = config("quickstart_tokens")
    patch_bytes = run.patching.target_patch_bytes or 4.5
    assert work_of_stages(run)["token_model"].num_bytes == 480 * 4 * 320 * patch_bytes


def test_rows_without_a_byte_budget_hold_as_many_as_their_patches():
    run = config("blt_1b", blt_training__row_bytes=0, blt_training__row_patches=1000)
    assert work_of_stages(run)["blt"].num_bytes == 6000 * 1024 * 4500


@given(
    num_bytes=st.floats(1e6, 1e13),
    chip=st.sampled_from(sorted(CHIPS)),
    mfu=st.floats(0.01, 1),
    chips=st.integers(1, 4096),
    price=st.floats(0, 100),
)
def test_hours_are_flops_over_rate(num_bytes, chip, mfu, chips, price):
    work = dict(blt=StageWork(num_bytes, 3e9, 1), entropies=StageWork(2 * num_bytes, 1e8, None))
    found = summary(work, chips, chip, mfu, price)
    seconds = (num_bytes * 3e9 + 2 * num_bytes * 1e8) / (mfu * CHIPS[chip].flops)
    assert found["chip_hours"] == pytest.approx(seconds / 3600)
    assert sum(found["stages"].values()) == pytest.approx(found["chip_hours"])
    assert found["hours"] == pytest.approx(found["chip_hours"] / chips)
    assert found["cost"] == pytest.approx(found["chip_hours"] * price)
    assert "cost" not in summary(work, chips, chip, mfu)


def test_chips_are_found_by_their_names():
    assert find_chip("NVIDIA H100 80GB HBM3") == CHIPS["h100"]
    assert find_chip("NVIDIA H100 PCIe") == CHIPS["h100-pcie"]
    assert find_chip("TPU v5 lite") == CHIPS["v5e"] and find_chip("TPU v5") == CHIPS["v5p"]
    assert find_chip("NVIDIA H1000") is None and find_chip("cpu") is None


def page_rows():
    page = (ROOT / "docs/scaling.md").read_text().split("## How long, and what it costs")[1]
    for line in page.split("\n## ")[0].splitlines():
        if found := re.fullmatch(r"\| `(blt_\w+)` \| (.*) \|", line):
            yield found[1], found[2].split(" | ")


def test_the_page_shows_what_the_command_says():
    rows = list(page_rows())
    assert len(rows) == 12
    assert "--mfu=0.3 --price=2.5" in (ROOT / "docs/scaling.md").read_text() and ASSUMED_MFU == 0.3
    for name, (text, *shown) in rows:
        own = text.endswith(", its own")
        num_bytes = float(text.removesuffix(", its own"))
        work = work_of_stages(config(name), None if own else num_bytes)
        h100, v5e = (summary(work, 1, chip, 0.3, 2.5) for chip in ("h100", "v5e"))
        wanted = work["blt"].flops_per_byte, h100["chip_hours"], v5e["chip_hours"], h100["cost"]
        assert work["blt"].num_bytes == pytest.approx(num_bytes, rel=5e-3)
        numbers = [float(cell.replace(",", "")) for cell in shown]
        assert numbers == pytest.approx(list(wanted), rel=1e-2), name


def test_the_steps_on_the_page_read_the_text():
    page = (ROOT / "docs/scaling.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^bltjax train --config=(blt_\w+) (.*blt_training.steps.*)$", page, re.M)
    assert len(commands) == 2
    for name, flags in commands:
        given = dict(re.findall(r"--config\.(\S+?)=(\d+)", flags))
        batches = {k: int(v) for k, v in given.items() if not k.endswith(".steps")}
        work = work_of_stages(read_config(config_path(name), batches), 1e10)
        assert work["blt"].steps == int(given["blt_training.steps"])
        assert work["entropy_model"].steps == int(given["entropy_training.steps"])
