"""The name of the model in the package, beside what a directory has under that name."""

import os
import warnings
from pathlib import Path

import pytest

import bltjax
from bltjax.checkpoints import formats
from bltjax.checkpoints.demo import DIRECTORY, directory_of
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.weights import WeightsError
from tests import directories


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current directory, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_name_is_that_of_the_package():
    assert directory_of("demo") == directory_of(Path("demo")) == DIRECTORY
    assert (DIRECTORY / "README.md").exists()


@pytest.mark.parametrize("path", ["./demo", "demo/", "demo2", "Demo", "a/demo", ""])
def test_other_paths_are_paths(path):
    assert directory_of(path) == Path(path)


def test_the_home_directory_is_known(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert directory_of("~/demo") == Path("/somewhere/demo")


def test_a_model_of_that_name_goes_before_it():
    directories.hub(Path("demo"), "hf_A_1b_like")
    assert directory_of("demo") == Path("demo")
    assert bltjax.load("demo").config == bltjax.load("./demo").config
    assert bltjax.load("demo").config != bltjax.load(DIRECTORY).config


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: path.mkdir(), WeightsError),
        (lambda path: path.write_text("a file"), NotADirectoryError),
        (lambda path: path.symlink_to("nothing"), FileNotFoundError),
    ],
    ids=["directory", "file", "dangling link"],
)
def test_where_something_else_hides_it_the_error_says_where_it_is(make, error):
    make(Path("demo"))
    with pytest.raises(error) as raised:
        bltjax.load("demo")
    assert f"the model in the package is {DIRECTORY}" in str(raised.value)


def test_a_path_to_nothing_tells_of_it():
    with pytest.raises(FileNotFoundError, match="or demo, a model in the package"):
        bltjax.load("nowhere")


def test_it_is_converted_by_its_name_and_keeps_its_rows():
    done = convert("demo", "ours", "bltjax", dtype="float32")
    assert done["models"] == ["blt", "entropy_model"] and done["dtypes"] == ["float32"]
    ours, theirs = formats.read("ours"), formats.read(DIRECTORY)
    assert ours.lengths == theirs.lengths and ours.lengths.row_bytes != 8192
    assert ours.patching == theirs.patching


def test_it_gives_its_entropy_model():
    directories.hub(Path("half"), "meta_A_1b_like")
    with warnings.catch_warnings(record=True):
        model = bltjax.load("half", entropy_model="demo")
    assert model.entropy_config == bltjax.load("demo").entropy_config


def test_its_files_are_not_written_to():
    before = {path: os.stat(path).st_mtime_ns for path in DIRECTORY.rglob("*")}
    bltjax.load("demo").score(["any"])
    assert before == {path: os.stat(path).st_mtime_ns for path in DIRECTORY.rglob("*")}
