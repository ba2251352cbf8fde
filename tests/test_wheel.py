"""The wheel holds everything that commands need, wherever they are run."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout, built from a copy of what git would commit."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = ["bltjax", "configs", "pyproject.toml", "setup.py", "requirements.txt", "README.md"]
    subprocess.run(["cp", "-r", *names, "LICENSE", source], cwd=ROOT, check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", target]
    subprocess.run([*pip, "wheel", *options, source], check=True)
    (built,) = target.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--target", target / "installed", built],
        check=True,
    )
    return built, target / "installed"


def test_every_file_of_the_package_and_every_config_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel[0]).namelist())
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "bltjax").rglob("*.py")}
    configs = {f"bltjax/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.py")}
    demo = {str(p.relative_to(ROOT)) for p in (ROOT / "bltjax/demo").rglob("*") if p.is_file()}
    others = {"bltjax/py.typed", "bltjax/serving/page.html"}
    assert package | configs | demo | others <= inside and len(demo) > 2


def test_the_console_script_finds_what_is_in_the_wheel_from_any_directory(wheel, tmp_path):
    def bltjax(*arguments, **options):
        return subprocess.run(
            [sys.executable, wheel[1] / "bin/bltjax", *arguments],
            cwd=tmp_path,
            env=os.environ | dict(PYTHONPATH=str(wheel[1])),
            capture_output=True,
            text=True,
            **options,
        )

    planned = bltjax("plan", "--config=quickstart", "--chips=1")
    assert planned.returncode == 0 and "blt: checked in" in planned.stdout, planned.stderr
    wrong = bltjax("plan", "--config=quickstrat", "--chips=1")
    assert wrong.returncode == 2 and "quickstart, " in wrong.stderr
    assert str(wheel[1]) not in wrong.stderr
    scored = bltjax("score", "--checkpoint=demo", "--input=-", input="import os\n")
    assert scored.returncode == 0 and json.loads(scored.stdout.splitlines()[-1]), scored.stderr
    unknown = bltjax("trian")
    assert unknown.returncode == 2 and "choose one of aot, byteify" in unknown.stderr
    listed = bltjax()
    assert listed.returncode == 0 and "train        Trains a model" in listed.stdout
    assert bltjax("--version").stdout.startswith("bltjax ")
