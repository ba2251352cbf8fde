"""What the README shows must work."""

import re
from pathlib import Path

import pytest

from tests import directories

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.long
def test_the_example_of_loading_runs(tmp_path):
    directories.meta_with_entropy_model(tmp_path / "model")
    names = {}
    exec(EXAMPLES[0].replace("path/to/blt-1b", str(tmp_path / "model")), names)
    assert names["model"].config.pooling == "max"


@pytest.mark.long
def test_the_example_of_the_model_runs():
    names = {}
    exec(EXAMPLES[1], names)
    assert names["logits"].shape == (*names["tokens"].shape, 260)
    assert len(EXAMPLES) == 2


def test_named_files_exist():
    for path in re.findall(r"`((?:configs|tests|benchmarks|bltjax)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
    tree = README.split("## The tree")[1].split("```")[1]
    listed = set(re.findall(r"^  ([\w.]+/?) ", tree, re.MULTILINE))
    package = {p.name + "/" * p.is_dir() for p in (ROOT / "bltjax").iterdir()}
    assert listed == {name for name in package if not name.startswith("__")}


PAGES = "README.md", "launch/README.md", "benchmarks/README.md", "benchmarks/studies/README.md"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_config_table_matches_the_files():
    table = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    assert table == {path.name for path in (ROOT / "configs").glob("*.py")}
