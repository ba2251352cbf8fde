"""Damaged weight files of every format: a clear error or an exact load, and nothing else."""

import functools
import json
import random
import shutil

import pytest

from bltjax.checkpoints import formats
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.pytorch.convert import convert
from bltjax.checkpoints.weights import flat
from tests import directories
from tests.weight_files import damaged

pytestmark = pytest.mark.long  # one interpreter will do

# Together more than 500 damages.
KINDS = {
    "hf": 130,
    "hf in shards": 130,
    "meta": 130,
    "meta, pickled": 130,
    "bltjax": 40,
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """kind -> (directory, everything in it), made once."""
    root = tmp_path_factory.mktemp("pristine")

    @functools.cache
    def make(kind):
        directory = root / kind
        if kind.startswith("hf"):
            directories.hub(directory, "hf_A_1b_like")
        if kind == "hf in shards":
            directories.shard(directory)
        if kind == "meta":
            directories.meta_with_entropy_model(directory)
        if kind == "meta, pickled":
            directories.local(directory, "meta_entropy", key="entropy_model")
        if kind == "bltjax":
            convert(directories.hub(root / "source", "meta_entropy"), directory, "bltjax")
            (directory / "checksums.json").unlink()  # what the format itself notices
        return directory, loaded(directory)

    return make


def loaded(directory):
    """The settings, and every parameter as bytes."""
    weights = formats.read(directory)
    values = {
        path: (leaf.dtype.name, leaf.shape, read_all(leaf).tobytes())
        for path, leaf in flat(weights.params).items()
    }
    return weights._replace(params={}), values


def header_end(path) -> int:
    """Bytes of a safetensors file before its tensors."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def damage(directory, kind, seed):
    """One damage to one weight file, or to the index; says what was done."""
    rng = random.Random(seed)
    index = directory / "model.safetensors.index.json"
    if index.exists() and rng.random() < 0.4:
        return damage_index(index, rng)
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    if kind == "bltjax":
        # Every stored value has a checksum, so that damage may be anywhere; not in model.json,
        # where another number is another model.
        files = [p for p in files if p.name != "model.json" and p.stat().st_size]
        # Names are random and many files are small and dead: most damages go to the large ones.
        sizes = [p.stat().st_size for p in files]
        [path] = rng.choices(files, [size + 5_000 for size in sizes])
        path.write_bytes(damaged(path.read_bytes(), seed))
        return f"{path.name}, anywhere"
    path = rng.choice([p for p in files if p.suffix in (".safetensors", ".pth")])
    if path.suffix == ".pth":  # tensors have checksums here too
        path.write_bytes(damaged(path.read_bytes(), seed))
        return f"{path.name}, anywhere"
    data, end = path.read_bytes(), header_end(path)
    if rng.random() < 0.25:
        path.write_bytes(data[: rng.randrange(len(data))])
        return f"{path.name}, cut"
    if rng.random() < 0.5:
        return damage_header(path, data, end, rng)
    path.write_bytes(damaged(data, seed, [range(end)]))
    return f"{path.name}, header bytes"


def damage_header(path, data, end, rng):
    """Shapes, dtypes, offsets or names that fit JSON and nothing else."""
    header = json.loads(data[8:end])
    names = [name for name in header if name != "__metadata__"]
    entry = header[name := rng.choice(names)]
    change = rng.choice(["shape", "dtype", "offsets", "name", "drop"])
    if change == "shape":
        entry["shape"] = rng.choice(
            [[*entry["shape"], 2], entry["shape"][1:], [-1], [2**62, 4], entry["shape"][::-1]]
        )
    elif change == "dtype":
        entry["dtype"] = rng.choice(["F16", "BF16", "I32", "F64", "U8", "Q4"])
    elif change == "offsets":
        begin, stop = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [[begin + 4, stop + 4], [stop, begin], [begin, stop - 4], [begin, 2**63]]
        )
    elif change == "name":
        header[name + rng.choice("0.x")] = header.pop(name)
    else:
        del header[name]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return f"{path.name}, {change} of {name}"


def damage_index(path, rng):
    index = json.loads(path.read_text())
    files, names = sorted({*index["weight_map"].values()}), sorted(index["weight_map"])
    change = rng.choice(["shuffle", "nowhere", "drop", "extra", "outside", "bytes", "shape"])
    if change == "shuffle":
        values = [index["weight_map"][name] for name in names]
        rng.shuffle(values)
        index["weight_map"] = dict(zip(names, values, strict=True))
    elif change == "nowhere":
        index["weight_map"][rng.choice(names)] = "model-00007-of-00003.safetensors"
    elif change == "drop":
        del index["weight_map"][rng.choice(names)]
    elif change == "extra":
        index["weight_map"]["model.extra.weight"] = rng.choice(files)
    elif change == "outside":
        index["weight_map"][rng.choice(names)] = rng.choice(["../x", "/etc/passwd", "", "a/b"])
    elif change == "shape":
        index["weight_map"] = rng.choice([[], None, {names[0]: 3}, names[0]])
    text = json.dumps(index).encode()
    path.write_bytes(damaged(text, rng.random()) if change == "bytes" else text)
    return f"index, {change}"


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_told_or_harmless(pristine, tmp_path, kind):
    original, expected = pristine(kind)
    told = 0
    for seed in range(KINDS[kind]):
        directory = tmp_path / str(seed)
        shutil.copytree(original, directory)
        done = damage(directory, kind, seed)
        try:
            found = loaded(directory)
        except (ValueError, OSError) as error:  # never another kind
            told += 1
            assert str(directory) in str(error), f"{done}: {error}"
        else:
            assert found == expected, f"seed {seed}: {done}: other weights, without a word"
        shutil.rmtree(directory)
    assert told > KINDS[kind] / 4


SETTINGS = {"hf": "config.json", "meta": "config.json", "meta, pickled": "params.json"}
SETTINGS |= {"meta ": "train_args.json", "bltjax": "model.json"}
ODD = [None, True, 0, -1, 3, 10**9, 10**400, 1.5, float("nan"), float("inf"), "", "x", [], [1], {}]


@pytest.mark.parametrize("kind", SETTINGS)
def test_odd_settings_are_told_or_harmless(pristine, tmp_path, kind):
    """Any field replaced by anything: an error of ours, or settings that make sense; no hang."""
    original, (_, values) = pristine(kind.strip())
    told, rng = 0, random.Random(kind)
    for i in range(80):
        directory = tmp_path / str(i)
        shutil.copytree(original, directory)
        path = directory / SETTINGS[kind]
        settings = json.loads(path.read_text())
        groups = [settings, *all_groups(settings)]
        group = rng.choice([g for g in groups if g])
        key = rng.choice(sorted(group))
        if rng.random() < 0.2:
            group[key + "x"] = group.pop(key)
        else:
            group[key] = rng.choice(ODD)
        text = json.dumps(settings)
        path.write_bytes(damaged(text.encode(), i) if rng.random() < 0.1 else text.encode())
        try:
            found, again = loaded(directory)
        except (ValueError, OSError) as error:
            told += 1
            assert str(directory) in str(error), f"{key}={group.get(key)!r}: {error}"
        else:
            assert again.keys() <= values.keys() and again, f"{key}={group.get(key)!r}"
            assert not [p for c in found[:2] if c is not None for p in c.problems("")]
        shutil.rmtree(directory)
    assert told > 15


def all_groups(settings):
    for value in settings.values():
        if isinstance(value, dict):
            yield value
            yield from all_groups(value)
