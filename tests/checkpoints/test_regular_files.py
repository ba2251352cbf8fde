"""What a loader opens: regular files and links to them, of bounded size; nothing makes it hang."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import tempfile
from pathlib import Path

import pytest

from bltjax.checkpoints import formats
from bltjax.checkpoints.orbax_weights import read_record
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.pytorch.fields import Fields, read_json
from bltjax.runtime import plain_files
from bltjax.runtime.checked_json import read_checked
from tests import directories

FORMATS = ("hf", "hf in shards", "meta", "meta, pickled", "bltjax", "run")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Directories of every format that opens, by format."""
    root = tmp_path_factory.mktemp("pristine")
    directories.hub(root / "hf", "hf_A_1b_like")
    directories.shard(directories.hub(root / "hf in shards", "hf_A_1b_like"))
    directories.meta_with_entropy_model(root / "meta")
    directories.local(root / "meta, pickled", "meta_A_1b_like")
    convert(root / "meta", root / "bltjax", "bltjax")
    shutil.unpack_archive(Path("tests/golden_data/run_of_0_1.tar.xz"), root / "unpacked")
    [config] = (root / "unpacked").rglob("config.json")
    config.parent.rename(root / "run")
    return root


@contextlib.contextmanager
def no_hang(seconds=20):
    """Raises where the block waits for something that never comes."""

    def give_up(*_):
        raise AssertionError("it hangs")

    old = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server, tempfile.TemporaryDirectory() as short:
        server.bind(f"{short}/s")  # such names must be short
        shutil.move(f"{short}/s", path)


ODD = {
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a directory": Path.mkdir,
}


def read_by_the_loader(directory):
    """The files that opening a directory needs."""
    names = [path for path in directory.rglob("*") if path.is_file()]
    if directory.name != "run":
        return names
    newest = directory / "blt" / "checkpoints"
    step = max(newest.iterdir(), key=lambda path: path.name.isdigit() and int(path.name))
    kept = [directory / name for name in ("config.json", "patching.json")]
    return [*kept, *(path for path in (step / "state").rglob("*") if path.is_file())]


@pytest.mark.parametrize("format", FORMATS)
def test_only_regular_files_are_opened(pristine, tmp_path, format):
    """Every file that is read, replaced by what is none; one kind after the other."""
    files = [p.relative_to(pristine / format) for p in read_by_the_loader(pristine / format)]
    kinds = list(ODD.items())[: 3 if format in ("run", "bltjax") else 4]
    for i, file in enumerate(sorted(files)[:12]):
        kind, make = kinds[i % len(kinds)]
        directory = tmp_path / str(i)
        shutil.copytree(pristine / format, directory, symlinks=True)
        (directory / file).unlink()
        make(directory / file)
        with no_hang(), pytest.raises((ValueError, OSError)) as raised:
            formats.read(directory)
        assert len(str(raised.value).splitlines()) <= 3, (file, kind, raised.value)
        assert kind in str(raised.value), (file, raised.value)
        shutil.rmtree(directory)


def test_every_file_of_a_directory_may_be_a_pipe(pristine, tmp_path):
    for name in ("config.json", "model.safetensors"):
        directory = tmp_path / name
        shutil.copytree(pristine / "hf", directory)
        (directory / name).unlink()
        os.mkfifo(directory / name)
        with no_hang(), pytest.raises(ValueError, match=f"{name}.*it is a pipe, must be a file"):
            formats.read(directory)


@pytest.mark.parametrize("format", ["hf", "hf in shards", "meta", "meta, pickled", "bltjax"])
def test_links_to_files_are_files(pristine, tmp_path, format):
    """As in the cache of the Hugging Face hub."""
    directory = tmp_path / "snapshot"
    shutil.copytree(pristine / format, tmp_path / "blobs")
    shutil.copytree(pristine / format, directory)
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        path.unlink()
        path.symlink_to(tmp_path / "blobs" / path.relative_to(directory))
    assert formats.read(directory).blt == formats.read(pristine / format).blt


def test_the_record_of_a_checkpoint_is_a_regular_file(tmp_path):
    (tmp_path / "4" / "record").mkdir(parents=True)
    os.mkfifo(tmp_path / "4" / "record" / "metadata")
    with no_hang(), pytest.raises(ValueError, match="it is a pipe, must be a file"):
        read_record(tmp_path / "4")


def test_checked_json_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "index.json")
    with no_hang(), pytest.raises(ValueError, match="it is a pipe, must be a file"):
        read_checked(tmp_path / "index.json")


@pytest.mark.parametrize(
    "format, name",
    [
        ("hf", "model.safetensors"),
        ("hf", "config.json"),
        ("hf in shards", "model.safetensors.index.json"),
        ("meta", "train_args.json"),
        ("meta", "entropy_model"),
        ("meta, pickled", "consolidated.pth"),
        ("meta, pickled", "params.json"),
        ("bltjax", "model.json"),
        ("bltjax", "weights"),
        ("run", "blt"),
    ],
)
def test_links_to_nothing_are_told(pristine, tmp_path, format, name):
    shutil.copytree(pristine / format, tmp_path / "copy")
    (tmp_path / "copy" / name).rename(tmp_path / "away")
    (tmp_path / "copy" / name).symlink_to(tmp_path / "gone")
    told = f"{name} is a link to nothing, {tmp_path / 'gone'}: download it again, or remove it"
    with pytest.raises(ValueError, match=re.escape(told)):
        formats.read(tmp_path / "copy", verify=False)


@pytest.mark.parametrize(
    "content, says",
    [
        (b'{"a": "' + b"x" * 2**24 + b'"}', f"at most {2**24} are read"),
        (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "deep"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "deep"),
        (b'{"a":' + b"[" * 10**6, "nested too deep"),
        (b'{"a": 1, "a": 2}', "a is there twice"),
    ],
    ids=["large", "lists", "objects", "bomb", "twins"],
)
def test_json_is_bounded(tmp_path, content, says):
    (tmp_path / "config.json").write_bytes(content)
    problems = []
    assert read_json(tmp_path / "config.json", problems) == {}
    assert len(problems) == 1 and says in problems[0] and len(problems[0]) < 300


def test_a_file_without_end_is_not_read_to_its_end(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(ValueError, match=f"it has {2**40} bytes, at most"):
        plain_files.read_bytes(tmp_path / "config.json")


def test_errors_have_no_bare_numbers(tmp_path):
    problems = []
    path = tmp_path / "file"
    path.touch()
    read_json(path / "config.json", problems)
    read_json(tmp_path / ("x" * 300), problems)
    assert len(problems) == 2
    assert "Errno" not in "".join(problems) and "File name too long" in problems[1]


def test_many_unknown_fields_take_no_time_and_few_lines():
    fields = Fields("config", {f"field{i}": i for i in range(200_000)})
    fields.ignore(f"known{i}" for i in range(200))
    with no_hang():
        fields.check_all_known()
    assert len(fields.problems) == 21 and "199980 more fields" in fields.problems[-1]
    dotted = Fields("config", json.loads('{"group.name": 1}'))
    dotted.ignore(["group.name"])
    dotted.check_all_known()
    assert len(dotted.problems) == 1  # that key is no way into a group
