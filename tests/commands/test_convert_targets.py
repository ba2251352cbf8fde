"""Where a conversion may write, and that it leaves all of its target or nothing."""

import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import bltjax
from bltjax.checkpoints import formats
from bltjax.checkpoints.pytorch import convert as conversion
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.weights import WeightsError
from bltjax.runtime.files import UNFINISHED, new_directory
from tests import directories

ROOT = Path(__file__).parents[2]
FORMATS = ("bltjax", "hf", "meta")


@pytest.fixture
def source(tmp_path):
    return directories.meta_with_entropy_model(tmp_path / "source")


def test_places_where_nothing_can_be_written(source, tmp_path):
    """Told in one line before any value is read, and nothing is changed."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = directories.contents(tmp_path)
    for target, says in {
        source: "is the source: choose another",
        tmp_path / "source" / ".." / "source": "is the source: choose another",
        tmp_path / "link": "is the source: choose another",
        source / "converted": f"is inside of {source}: choose another",
        source / "entropy_model" / "a" / "b": f"is inside of {source}: choose another",
        tmp_path / "link" / "converted": "is inside of .*source: choose another",
        tmp_path / "file": "exists: choose another target, or delete it",
        tmp_path: "exists: choose another target, or delete it",
        tmp_path / "file" / "target": "is a file, so .* cannot be: choose another",
        tmp_path / "loop" / "target": "choose another",
        tmp_path / ("x" * 300): "choose another",
        tmp_path / ("x" * 250): "cannot write .*File name too long",
        tmp_path / "a\0b": "choose another",
        Path("/proc/target"): "choose another|cannot write",
    }.items():
        with pytest.raises((OSError, ValueError), match=says) as raised:
            convert(source, target, "meta")
        assert len(str(raised.value).splitlines()) == 1 and "Errno" not in str(raised.value)
        assert not isinstance(raised.value, WeightsError)
    assert directories.contents(tmp_path) == before


def test_no_value_is_read_where_the_target_cannot_be(source, tmp_path):
    """It may take minutes to find that one of them is not finite."""

    def change(found):
        next(iter(found.values()))[:] = np.nan

    directories.rewrite(source, change)
    with pytest.raises(FileExistsError, match="exists: choose another target"):
        convert(source, tmp_path, "meta")
    with pytest.raises(WeightsError, match="finite"):
        convert(source, tmp_path / "target", "meta")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_told(source, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OSError, match="closed is not writable: choose another target"):
        convert(source, tmp_path / "closed" / "target", "meta")


def test_the_entropy_models_directory_is_a_source_too(source, tmp_path):
    other = directories.hub(tmp_path / "other", "meta_entropy")
    with pytest.raises(ValueError, match=r"is inside of .*other"):
        convert(source, other / "target", "meta", entropy_model=other)


def test_a_source_that_is_a_file(source, tmp_path):
    for read in (bltjax.load, lambda path: convert(path, tmp_path / "target", "meta")):
        with pytest.raises(OSError, match="is a file: give the directory that it is in"):
            read(source / "model.safetensors")


def test_paths_may_begin_at_home(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    convert("~/source", "~/made/target", "meta")
    assert formats.read(tmp_path / "made" / "target").blt is not None


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing_and_one_line(source, tmp_path, format):
    """The operating system refuses files over a size: of settings, of weights, in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (0, 20, 5_000, 20_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(OSError, match=r"cannot write .*File too large") as raised:
                convert(source, tmp_path / "a" / "target", format)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert len(str(raised.value).splitlines()) == 1 and "Errno" not in str(raised.value)
            assert str(tmp_path / "a" / "target") in str(raised.value)
            assert [path.name for path in tmp_path.iterdir()] == ["source"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    convert(source, tmp_path / "a" / "target", format)


def test_a_disk_without_room_is_told_before_writing(source, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match=r"needs 0\.00 GB and the disk has 0\.00 GB free: make room"):
        convert(source, tmp_path / "target", "meta")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_threads_of_what_was_interrupted_leave_nothing(tmp_path):
    """Libraries go on writing, and make directories again, after Ctrl-C."""

    def go_on(folder):
        for i in range(60):
            (folder / "weights").mkdir(parents=True, exist_ok=i < 50)
            (folder / "weights" / str(i)).touch()
            time.sleep(0.005)

    def quietly(folder):
        try:
            go_on(folder)
        except OSError:  # its directory is gone
            return

    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "target") as partial:
        thread = threading.Thread(target=quietly, args=(partial,))
        thread.start()
        time.sleep(0.05)
        raise KeyboardInterrupt
    thread.join()
    left = tmp_path / ".target.partial"
    assert not left.exists()


@pytest.mark.long
@pytest.mark.parametrize("format", ["bltjax", "hf"])
def test_ctrl_c_while_writing_leaves_nothing(tmp_path, format):
    from tests.commands.test_convert import converting, large_model

    large_model(tmp_path / "source")
    target, partial = tmp_path / "target", tmp_path / ".target.partial"
    names = [f"--source={tmp_path / 'source'}", f"--target={target}", f"--format={format}"]
    process = converting(names)
    while process.poll() is None and not (partial / UNFINISHED).exists():
        time.sleep(0.002)
    time.sleep(0.03)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
