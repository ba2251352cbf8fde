"""checksums.json: any flipped bit in what `convert` made is told, and what others add is not."""

import hashlib
import json
import os
import random
import shutil

import pytest

import bltjax
from bltjax.checkpoints import formats
from bltjax.checkpoints.checksums import CARD, CHECKSUMS, checksum_problems, write_checksums
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.weights import WeightsError
from tests import directories

REMEDY = "copy or convert it again, or delete checksums.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model converted to each format."""
    root = tmp_path_factory.mktemp("made")
    source = directories.meta_with_entropy_model(root / "source")
    for format in ("bltjax", "hf", "meta"):
        convert(source, root / format, format)
    return root


def files_below(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("format", ["bltjax", "hf", "meta"])
def test_every_file_is_listed_as_sha256sum_has_it(made, format):
    listed = json.loads((made / format / CHECKSUMS).read_text())["sha256"]
    for path in files_below(made / format):
        name = path.relative_to(made / format).as_posix()
        if name not in (CHECKSUMS, CARD):
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            assert listed.pop(name) == dict(bytes=len(content), digest=digest)
    assert not listed
    assert checksum_problems(made / format) == []


@pytest.mark.parametrize("format", ["bltjax", "hf", "meta"])
def test_a_flipped_bit_anywhere_is_told_with_its_file(made, tmp_path, format):
    """Also in the list itself, and also where the format has no way to notice."""
    rng = random.Random(format)
    copy = tmp_path / "copy"
    shutil.copytree(made / format, copy)
    files = [p for p in files_below(copy) if p.stat().st_size and p.name != CARD]
    for path in rng.sample(files, min(len(files), 25)):
        whole, name = path.read_bytes(), path.relative_to(copy).as_posix()
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises((WeightsError, FileNotFoundError)) as raised:
            formats.read(copy)
        path.write_bytes(whole)
        assert REMEDY in str(raised.value) and len(str(raised.value).splitlines()) == 1
        if not name.endswith(CHECKSUMS):
            assert name in str(raised.value)
            assert hashlib.sha256(content).hexdigest() in str(raised.value)
            assert hashlib.sha256(whole).hexdigest() in str(raised.value)


def test_load_and_convert_look_at_them_and_load_need_not(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made / "hf", copy)
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last bit of a weight: the format cannot see it
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors has sha256"):
        bltjax.load(copy)
    with pytest.raises(WeightsError, match=r"model\.safetensors has sha256"):
        convert(copy, tmp_path / "target", "meta")
    assert bltjax.load(copy, verify=False).config is not None
    (copy / CHECKSUMS).unlink()  # as directories of others come, and those of earlier versions
    assert bltjax.load(copy).config is not None


def test_what_others_put_there_does_no_harm(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made / "meta", copy)
    (copy / "README.md").write_text("about")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "lock").touch()
    os.mkfifo(copy / "pipe")
    assert formats.read(copy).blt is not None


def test_a_file_that_is_gone_or_cut_is_told(made, tmp_path):
    for name in ("generation_config.json", "config.json", "model.safetensors"):
        copy = tmp_path / name
        shutil.copytree(made / "hf", copy)
        if name.startswith("model"):
            os.truncate(copy / name, 1000)
            says = f"{name} has 1000 bytes, {CHECKSUMS} says"
        else:
            (copy / name).unlink()
            says = f"{name} is missing, {CHECKSUMS} lists it"
        assert [problem for problem in checksum_problems(copy) if says in problem]


def test_an_entropy_model_is_checked_wherever_it_is(made, tmp_path):
    """Inside of its model, and alone."""
    copy = tmp_path / "copy"
    shutil.copytree(made / "meta", copy)
    path = copy / "entropy_model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    for arguments in ((copy,), (copy / "entropy_model",), (made / "hf", copy / "entropy_model")):
        with pytest.raises(WeightsError, match=r"model\.safetensors has sha256"):
            formats.read(*arguments)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"sha256": {}}',
        b'{"sha256": {"config.json": "00"}}',
        b'{"sha256": {"config.json": {"bytes": 1}}}',
        b'{"sha256": {"../config.json": {"bytes": 1, "digest": "0"}}}',
        b'{"sha256": {"/etc/passwd": {"bytes": 1, "digest": "0"}}}',
        b'{"sha256": {"": {"bytes": 1, "digest": "0"}}}',
        b'{"sha256": {"a\\u0000": {"bytes": 1, "digest": "0"}}}',
        b"[" * 100_000,
    ],
    ids=lambda content: content[:40],
)
def test_a_damaged_list_is_told(tmp_path, content):
    (tmp_path / CHECKSUMS).write_bytes(content)
    [problem] = checksum_problems(tmp_path)
    assert problem.startswith(f"{CHECKSUMS} is damaged") and REMEDY in problem


def test_progress_counts_what_is_hashed(tmp_path):
    (tmp_path / "large").write_bytes(bytes(3 * 2**20 + 1))
    told: list[int] = []
    write_checksums(tmp_path, told.append)
    assert sum(told) == 3 * 2**20 + 1 and max(told) == 2**20  # what is in memory at a time
    assert checksum_problems(tmp_path, told.append) == []
    assert sum(told) == 2 * (3 * 2**20 + 1)
