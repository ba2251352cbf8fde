"""Whatever happens to a checkpoint: it is restored bit for bit, or its damage is noticed."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bltjax import sharding
from bltjax.checkpoints import fingerprints, host_fingerprints, orbax_weights, training_state
from bltjax.checkpoints.fingerprints import digest, leaf_fingerprints
from bltjax.checkpoints.lazy_arrays import blocks
from bltjax.checkpoints.training_state import CheckpointError, Checkpoints, load_params

ROOT = Path(__file__).parents[2]
AXES = {"w": (None, "embed", "heads"), "half": ("heads", "embed"), "mask": ("embed",), "scale": ()}


class State(NamedTuple):
    step: Any
    params: dict
    opt_state: Any


def host_state(step):
    """Random bits: they are stored as they are, since nothing compresses them."""
    rng = np.random.default_rng(step)
    half = np.frombuffer(rng.bytes(2 * 2 * 8 * 16), np.uint16).reshape(2, 8, 16)
    # No NaN: where bfloat16 goes through float32, as XLA's older emitters have it, one is quieted.
    half = iter((half & 0xBFFF).view(ml_dtypes.bfloat16))

    def params():
        return {
            "w": np.frombuffer(rng.bytes(4 * 2 * 16 * 24), np.float32).reshape(2, 16, 24),
            "half": next(half),
            "mask": rng.random(16) < 0.5,
            "scale": np.float32(rng.normal()).reshape(()),
        }

    return State(np.int32(step).reshape(()), params(), ({"mu": params()}, (), None))


def placed(state):
    """On the mesh that is set."""

    def place(path, x):
        axes = AXES.get(getattr(path[-1], "key", None), ())
        return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec(*axes)))

    return jax.tree_util.tree_map_with_path(place, state)


def abstract(state=None):
    state = placed(host_state(0)) if state is None else state
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(
        (x.shape, x.dtype) == (y.shape, y.dtype) and np.asarray(x).tobytes() == y.tobytes()
        for x, y in pairs
    )


@contextlib.contextmanager
def opened(directory, **settings):
    checkpoints = Checkpoints(directory, **settings)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of the steps 10, 20 and 30, for tests to copy."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with (
        jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])),
        opened(directory, keep=3, about=dict(config=dict(dim=16))) as checkpoints,
    ):
        for step in (10, 20, 30):
            checkpoints.save(step, placed(host_state(step)), {"lanes": [step, 2**60]})
    return directory


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def one(run):
    """A directory with the checkpoint of step 30 alone."""
    for step in ("10", "20"):
        shutil.rmtree(run / step)
    return run


def data_file(step_directory):
    """The largest file of the arrays."""
    files = (path for path in step_directory.glob("state/**/d/*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def flip(path, chance):
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def empty(path, chance):
    path.write_bytes(b"")


def truncate(path, chance):
    path.write_bytes(path.read_bytes()[: chance.randrange(1, path.stat().st_size)])


def delete(path, chance):
    path.unlink()


def scramble(path, chance):
    path.write_bytes(chance.randbytes(path.stat().st_size))


def replace_by_json(path, chance):
    path.write_text("[1]")


FAULTS = (flip, empty, truncate, delete, scramble, replace_by_json)


def faults(step_directory):
    """Each kind of fault in each file, then flipped bits in the largest one: (fault, path)."""
    files = [path for path in step_directory.rglob("*") if path.is_file()]
    files = sorted(path.relative_to(step_directory) for path in files)
    flips = 20 * [(flip, data_file(step_directory).relative_to(step_directory))]
    return [(fault, path) for path in files for fault in FAULTS] + flips


def test_what_is_saved_comes_back(run):
    with opened(run) as checkpoints:
        state, position, step = checkpoints.restore(abstract())
        assert step == checkpoints.all_steps()[-1] == 30
    assert same_bits(state, host_state(30))
    assert position == {"lanes": [30, 2**60]}
    record = json.loads((run / "30" / "record" / "metadata").read_text())
    assert record["about"]["config"] == {"dim": 16} and record["about"]["processes"] == 1
    assert record["about"]["versions"]["jax"] == jax.__version__
    assert not (run.parent / "damaged").exists()


def test_nothing_saved_yet(tmp_path):
    with opened(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.restore(abstract()) is None
    with pytest.raises(FileNotFoundError, match="train that stage first"):
        load_params(tmp_path / "new" / "checkpoints", abstract().params)


def test_no_fault_gives_wrong_values(one, tmp_path, capfd):
    """Every kind of fault in every file. Bytes that nobody needs may be damaged unnoticed."""
    chance, wanted, noticed, harmless = random.Random(), abstract(), [], 0
    for number, (fault, path) in enumerate(faults(one / "30")):
        # A copy for each, since TensorStore keeps in memory what it has read.
        directory = tmp_path / str(number) / "checkpoints"
        shutil.copytree(one, directory)
        fault(directory / "30" / path, chance)
        with opened(directory) as checkpoints:
            try:
                state, position, _ = checkpoints.restore(wanted)
            except CheckpointError as error:
                noticed.append(str(error))
            else:
                assert same_bits(state, host_state(30)), (fault, path)
                assert position == {"lanes": [30, 2**60]}, (fault, path)
                harmless += 1
    assert len(noticed) > 30 and harmless
    assert any("other values than were saved" in error for error in noticed)
    assert "Traceback" not in capfd.readouterr().err


def edit(change):
    """Changes the record of position and fingerprints, which stays JSON."""

    def damage(directory):
        path = directory / "record" / "metadata"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return damage


def copied_from_another_step(directory):
    shutil.rmtree(directory)
    shutil.copytree(directory.with_name("20"), directory)


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: [shutil.rmtree(directory), directory.mkdir()],
        lambda directory: shutil.rmtree(directory / "state"),
        edit(lambda record: record["position"]["lanes"].reverse()),
        edit(lambda record: record["arrays"]["params.w"].update(fingerprint=1)),
        copied_from_another_step,
    ],
    ids=["emptied", "no state", "position", "fingerprint", "copied"],
)
def test_a_damaged_checkpoint_is_moved_and_the_one_before_it_used(run, damage, capfd):
    damage(run / "30")
    left = sorted(p.relative_to(run / "30") for p in (run / "30").rglob("*"))
    with opened(run) as checkpoints:
        state, position, step = checkpoints.restore(abstract())
        assert checkpoints.all_steps() == [10, 20]
    assert (step, position) == (20, {"lanes": [20, 2**60]}) and same_bits(state, host_state(20))
    moved = run.parent / "damaged" / "30"
    assert sorted(p.relative_to(moved) for p in moved.rglob("*")) == left
    warnings = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in warnings] == ["WARNING"] * 3
    assert f"{run / '30'} is damaged" in warnings[0] and str(moved) in warnings[1]
    assert "goes on from step 20" in warnings[2]


def test_a_file_that_others_put_there_is_no_damage(run):
    (run / "30" / "state" / ".nfs0001").write_text("")
    with opened(run) as checkpoints:
        assert checkpoints.restore(abstract()).step == 30


def test_training_goes_on_through_the_damaged_step(run, capfd):
    """Twice, and where the decoder fails as well, in one process."""
    with opened(run, keep=9) as checkpoints:
        for name in ("30", "30-2"):
            data_file(run / "30").write_bytes(b"\0" * 9)
            assert checkpoints.restore(abstract()).step == 20
            assert (run.parent / "damaged" / name).is_dir()
            checkpoints.save(30, placed(host_state(31)), {})
            checkpoints.wait()
        checkpoints.save(40, placed(host_state(40)), {})
        checkpoints.wait()
        assert checkpoints.all_steps() == [10, 20, 30, 40]
        shutil.rmtree(run / "40" / "state")
        assert same_bits(checkpoints.restore(abstract()).state, host_state(31))
    assert "Traceback" not in capfd.readouterr().err


def test_where_all_are_damaged_nothing_is_moved(run):
    for step in ("10", "20", "30"):
        data_file(run / step).unlink()
    with opened(run) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(abstract())
        assert checkpoints.all_steps() == [10, 20, 30]
    assert all(f"{run / step}: " in str(error.value) for step in ("10", "20", "30"))
    assert f"move {run} away to start this stage anew" in str(error.value)
    assert not (run.parent / "damaged").exists()


def changed(**leaves):
    """`abstract()` with other, more (or, where None, fewer) parameters."""
    params = abstract().params | leaves
    return abstract()._replace(params={k: v for k, v in params.items() if v is not None})


@pytest.mark.parametrize(
    "leaves, differences",
    [
        (
            dict(w=jax.ShapeDtypeStruct((2, 16, 24), jnp.int8)),
            [r"params.w is float32[2, 16, 24] instead of int8[2, 16, 24];"],
        ),
        (
            dict(half=jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)),
            [r"params.half is bfloat16[8, 16] instead of bfloat16[8, 8];"],
        ),
        (dict(scale=None), ["params.scale is float32[] instead of absent;"]),
        (
            {f"new{i}": jax.ShapeDtypeStruct((), jnp.int32) for i in range(5)},
            ["params.new0 is missing instead of int32[];", " and 2 more; give the conf"],
        ),
    ],
    ids=["dtype", "shape", "a name less", "names more"],
)
def test_another_model_is_an_error_and_no_damage(run, leaves, differences):
    with opened(run) as checkpoints:
        for read in (
            lambda: checkpoints.restore(changed(**leaves)),
            lambda: load_params(run, changed(**leaves).params),
        ):
            with pytest.raises(CheckpointError, match="/30 is of another model") as error:
                read()
            assert all(text in str(error.value) for text in differences)
        assert checkpoints.all_steps() == [10, 20, 30]


def test_newest_and_round_steps_are_kept_and_none_is_written_twice(tmp_path):
    with opened(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(3, 12):
            checkpoints.save(step, placed(host_state(step)), {"step": step})
        assert checkpoints.all_steps()[-1] == 11
        checkpoints.save(11, placed(host_state(0)), {"step": 0})
        checkpoints.wait()
        assert checkpoints.all_steps() == [4, 8, 10, 11]
        assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 8, 10, 11]
        state, position, _ = checkpoints.restore(abstract())
        assert position == {"step": 11} and same_bits(state, host_state(11))


def test_a_directory_with_the_name_of_no_step_does_not_take_the_place_of_checkpoints(tmp_path):
    for name in ("99999999999", "tmp", "007", "5 "):
        (tmp_path / name).mkdir()
    (tmp_path / "9").touch()  # a file is no checkpoint
    with opened(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(abstract()) is None
        for step in (1, 2):
            checkpoints.save(step, placed(host_state(step)), {})
        checkpoints.wait()
        assert checkpoints.all_steps() == [2] and checkpoints.restore(abstract()).step == 2
    assert {p.name for p in tmp_path.iterdir()} >= {"99999999999", "tmp", "007", "5 ", "2", "9"}


def test_other_meshes(tmp_path, use_mesh):
    with use_mesh(2, 2, 2):
        numbers = leaf_fingerprints(placed(host_state(1)))
        with opened(tmp_path) as checkpoints:
            checkpoints.save(1, placed(host_state(1)), {})
    for sizes in ((1, 8, 1), (8, 1, 1), (1, 1, 1)):
        with use_mesh(*sizes), opened(tmp_path) as checkpoints:
            wanted = abstract()
            state = checkpoints.restore(wanted).state
            assert same_bits(state, host_state(1))
            assert leaf_fingerprints(state) == numbers
            jax.tree.map(
                lambda x, a: np.testing.assert_equal(x.sharding, a.sharding), state, wanted
            )


def test_parameters_alone(run, monkeypatch):
    pieces, read = [], orbax_weights._Stored.__getitem__

    def counting(stored, index):
        pieces.append(read(stored, index))
        return pieces[-1]

    monkeypatch.setattr(orbax_weights._Stored, "__getitem__", counting)
    params = host_state(30).params
    assert same_bits(load_params(run, abstract().params), params)
    assert sum(x.nbytes for x in pieces) == sum(x.nbytes for x in params.values())
    (run / "30" / "record" / "metadata").unlink()  # TensorStore keeps what it has read of others
    with pytest.raises(CheckpointError, match="run its stage again: it goes on from step 20"):
        load_params(run, abstract().params)
    assert (run / "30").is_dir()


def test_arrays_are_stored_in_pieces(tmp_path, monkeypatch):
    """So that reading a part of a large one does not decode all of it."""
    monkeypatch.setattr(training_state, "CHUNK_BYTES", 512)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, placed(host_state(1)), {})
        checkpoints.wait()
        assert same_bits(checkpoints.restore(abstract()).state, host_state(1))
    stored = orbax_weights.open_weights(tmp_path / "1" / "state")["params"]["w"]
    assert 4 * np.prod(stored._store.chunk_layout.read_chunk.shape) <= 512


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")],
    ids=["host", "devices"],
)
def test_too_little_memory_is_no_damage(run, monkeypatch, error):
    def full(*arguments):
        raise error

    monkeypatch.setattr(training_state.placing, "put_lazy", full)
    with opened(run) as checkpoints, pytest.raises(type(error)):
        checkpoints.restore(abstract())
    assert (run / "30").is_dir()


@contextlib.contextmanager
def without_permission(directory, mode):
    """As a user who is not the owner where we are root, to whom modes mean nothing."""
    user, before = os.geteuid(), directory.stat().st_mode
    directory.chmod(mode)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        directory.chmod(before)


def test_no_permission_is_no_damage_and_said_in_one_line(saved):
    threads = set(threading.enumerate())
    with tempfile.TemporaryDirectory() as top:  # pytest's own are closed to other users
        os.chmod(top, 0o755)
        directory = Path(top) / "checkpoints"
        shutil.copytree(saved, directory)
        state, wanted = placed(host_state(40)), abstract()
        with opened(directory, keep=9) as checkpoints:
            for part in ("", "state", "state/d"):
                with (
                    without_permission(directory / "30" / part, 0o000),
                    pytest.raises((OSError, ValueError), match=r"(?i)permission.denied") as error,
                ):
                    checkpoints.restore(wanted)
                assert f"{directory / '30' / part}" in str(error.value)
                assert "damaged" not in str(error.value)
            with without_permission(directory, 0o555):
                with pytest.raises(OSError, match=r"/40 \(Permission denied\): make the dir.*30$"):
                    checkpoints.save(40, state, {})
                    checkpoints.wait()
                with pytest.raises(OSError, match=r"checkpoints \(Permission denied\): make"):
                    Checkpoints(directory)
            assert checkpoints.all_steps() == [10, 20, 30]
            assert same_bits(checkpoints.restore(wanted).state, host_state(30))
            checkpoints.save(40, state, {})
        assert (directory / "40").is_dir()
    left = set(threading.enumerate()) - threads
    assert all(thread.daemon for thread in left), f"the process could not end: {left}"


def test_places_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file \(File exists\): move the file that is in the way"):
        Checkpoints(tmp_path / "file")
    with opened(run, keep=9) as checkpoints:
        run.rename(tmp_path / "elsewhere")
        for _ in range(2):
            with pytest.raises(OSError, match=r"/40 \(No such file.*\): put the directory back"):
                checkpoints.save(40, placed(host_state(40)), {})
        assert not run.exists()


PRELUDE = """
import os, signal, sys, threading, time
from pathlib import Path
import jax
from bltjax import sharding
from bltjax.checkpoints import training_state as checkpoint

directory = Path(sys.argv[1])
jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1]))
checkpoints = checkpoint.Checkpoints(directory)

def state(step, size, leaves=1):
    parts = jax.random.normal(jax.random.key(step), (leaves, size // leaves))
    return dict(params=dict(zip(["w", *map(str, range(1, leaves))], parts)))
"""
KILLED = """
checkpoints.save(1, state(1, 1000), {})
checkpoints.wait()
checkpoints.save(2, state(2, 4_000_000), {})
moment = dict(written="2.orbax-checkpoint-tmp*/state*", committed="2")[sys.argv[2]]
while not list(directory.glob(moment)):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""
FULL = """
checkpoints.save(1, state(1, 1000), {})
checkpoints.save(2, state(2, 1_200_000, leaves=60), {})  # each of them is a write that may fail
try:
    checkpoints.wait()
except OSError as error:
    print(error)
wanted = jax.eval_shape(lambda: state(1, 1000))
print(checkpoints.restore(wanted).step)
checkpoints.save(3, state(3, 3_000_000), {})
try:
    checkpoints.save(4, state(4, 1000), {})
except OSError as error:
    print(error)
checkpoints.close()
checkpoints = checkpoint.Checkpoints(directory)  # which makes room
checkpoints.save(4, state(4, 1000), {})
checkpoints.wait()
print(checkpoints.all_steps(), checkpoints.restore(wanted).step)
checkpoints.close()
"""


def script(program, *arguments, prefix=()):
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", PRELUDE + program, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_killed_at_any_moment(tmp_path):
    moments = {"written": 1, "committed": 2}
    processes = {moment: script(KILLED, tmp_path / moment, moment) for moment in moments}
    for moment, newest in moments.items():
        stderr = processes[moment].communicate(timeout=60)[1]
        assert processes[moment].returncode == -signal.SIGKILL, stderr
        unfinished = list((tmp_path / moment).glob("2.orbax-checkpoint-tmp*"))
        assert bool(unfinished) == (newest == 1)
        (tmp_path / moment / "7.orbax-checkpoint-tmp").mkdir()
        size = {1: 1000, 2: 4_000_000}[newest]
        wanted = {"params": {"w": jax.ShapeDtypeStruct((size,), "float32")}}
        with opened(tmp_path / moment, keep=9) as checkpoints:
            assert checkpoints.restore(wanted).step == checkpoints.all_steps()[-1] == newest
            checkpoints.save(2, {"params": {"w": jnp.zeros(3)}}, {})
        assert not list((tmp_path / moment).glob("*.orbax-checkpoint-tmp*"))
        left = {path.name for path in (tmp_path / moment).iterdir()}
        assert left in ([{"1", "2"}] if newest == 1 else [{"1", "2"}, {"2"}])


def test_a_full_disk_is_said_in_one_line_and_costs_no_older_checkpoint(tmp_path):
    mount = f"mount -t tmpfs -o size=1500k tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-rm", *mount.split()], capture_output=True).returncode:
        pytest.skip(
            "needs a small file system of its own, and `unshare -rm mount` is not permitted"
        )
    small_disk = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    process = script(FULL, tmp_path / "checkpoints", prefix=small_disk)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    failed, restored, failed_again, end = output.splitlines()
    for line, step in ((failed, 2), (failed_again, 3)):
        assert line == (
            f"cannot write {tmp_path}/checkpoints/{step} (No space left on device): free some "
            "disk space and run it again: it goes on from step 1"
        )
    assert (restored, end) == ("1", "[4] 4")
    assert errors == ""


def test_a_fingerprint_changes_with_any_bit_and_any_exchange():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, ml_dtypes.bfloat16, np.int8, np.int32):
        size = np.dtype(dtype).itemsize
        values = np.ones((4, 6), dtype)  # the worst that there is to tell apart
        values[1] = 0
        numbers = {leaf_fingerprints(values)[""]}
        for _ in range(30):
            bits = bytearray(values.tobytes())
            bits[rng.integers(len(bits))] ^= 1 << rng.integers(8)
            changed = np.frombuffer(bits, dtype).reshape(4, 6)
            assert leaf_fingerprints(changed)[""] not in numbers
        others = [values[::-1], values[[1, 0, 2, 3]], values.T.reshape(4, 6)]
        numbers |= {leaf_fingerprints(np.ascontiguousarray(x))[""] for x in others}
        assert len(numbers) == 4 and size * values.size == len(bits)
    masks = [np.zeros(5, bool), *np.eye(5, dtype=bool)]
    assert len({leaf_fingerprints(mask)[""] for mask in masks}) == 6
    tree = {"a": np.ones(3, np.float32), "b": np.zeros(3, np.float32)}
    assert digest(tree) == digest(dict(reversed(tree.items())))
    assert digest(tree) != digest({"a": tree["b"], "b": tree["a"]})
    assert re.fullmatch("[0-9a-f]{16}", digest(tree))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.int8])
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (3, 4, 11), (2, 0)])
def test_the_host_makes_the_same_fingerprints_of_pieces(monkeypatch, dtype, shape):
    monkeypatch.setattr(host_fingerprints, "AT_ONCE", 4)
    rng, size = np.random.default_rng(0), np.dtype(dtype).itemsize
    values = np.frombuffer(rng.bytes(size * math.prod(shape)), f"u{size}").view(dtype)
    values = values.reshape(shape)
    for max_bytes in (1, 40, 1000):
        total = host_fingerprints.HostFingerprint()
        for index in blocks(values, max_bytes):
            total.add(values[index])
        assert total.value == leaf_fingerprints(jax.device_put(values))[""]


def test_no_array_is_gathered_for_its_fingerprint(use_mesh):
    with use_mesh(2, 2, 2):
        leaves = jax.tree.leaves(placed(host_state(1)))
        compiled = fingerprints._fingerprints.lower(leaves).compile().as_text()
    assert "all-reduce" in compiled  # of the sums
    assert not re.search("all-gather|all-to-all|collective-permute", compiled)
