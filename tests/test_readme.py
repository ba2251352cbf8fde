"""What the README shows must work."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["logits"].shape == (*names["tokens"].shape, 260)


def test_named_files_exist():
    for path in re.findall(r"`((?:configs|tests|benchmarks|bltjax)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
    tree = README.split("## The tree")[1].split("```")[1]
    listed = set(re.findall(r"^  ([\w.]+/?) ", tree, re.MULTILINE))
    package = {p.name + "/" * p.is_dir() for p in (ROOT / "bltjax").iterdir()}
    assert listed == {name for name in package if not name.startswith("__")}


def test_config_table_matches_the_files():
    table = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    assert table == {path.name for path in (ROOT / "configs").glob("*.py")}
