"""Checkpoints in a bucket: committed last, compared when read, few requests."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.checkpoints import orbax_weights
from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.run_directory import saved_steps
from bltjax.checkpoints.training_state import CheckpointError, Checkpoints
from bltjax.runtime import buckets
from bltjax.runtime.checked_json import with_digest

BESIDE_DATA = 60  # requests of a checkpoint


def state_of(step):
    params = {f"w{i}": jnp.arange(4096.0).reshape(64, 64) * (i + 1) + step for i in range(12)}
    return dict(params=params, step=jnp.int32(step))


@pytest.fixture
def saved(bucket):
    """The directory of two checkpoints, of steps 3 and 6."""
    checkpoints = Checkpoints(bucket, keep=2)
    for step in (3, 6):
        checkpoints.save(step, state_of(step), dict(place=step))
    checkpoints.close()
    return bucket


def restored(directory):
    checkpoints = Checkpoints(directory, keep=2)
    try:
        return checkpoints.restore(state_of(0))
    finally:
        checkpoints.close()


def check(found, step):
    assert (found.step, found.position) == (step, dict(place=step))
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(step))


def test_what_is_saved_comes_back(saved):
    assert saved_steps(saved) == [3, 6]
    check(restored(saved), 6)
    assert restored(saved / "empty") is None
    params = orbax_weights.open_params(saved)
    np.testing.assert_array_equal(read_all(params["w3"]), state_of(6)["params"]["w3"])


def test_old_ones_are_deleted(bucket):
    checkpoints = Checkpoints(bucket, keep=1, keep_every=4)
    for step in (2, 4, 6, 7):
        checkpoints.save(step, state_of(step), {})
    checkpoints.close()
    assert checkpoints.all_steps() == saved_steps(bucket) == [4, 7]
    objects, folders = buckets.entries(bucket)
    assert (sorted(objects), folders) == (["4.committed", "7.committed"], ["4", "7"])


def test_requests_of_a_checkpoint(bucket, server):
    checkpoints = Checkpoints(bucket, keep=1)
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()
    before = len(server.requests())
    checkpoints.save(2, state_of(2), {})
    checkpoints.wait()
    made = server.requests()[before:]
    beside = [r for r in made if "%2Fd%2F" not in r and "manifest.ocdbt" not in r]
    print(f"{len(made)} requests, {len(beside)} beside data")
    assert len(beside) <= BESIDE_DATA, "\n".join(beside)
    checkpoints.close()


def test_what_was_half_written_is_removed(saved, capfd):
    buckets.delete(saved / "6.committed")
    assert saved_steps(saved) == [3]  # also for who only reads
    check(restored(saved), 3)
    assert buckets.entries(saved)[1] == ["3"]
    assert "WARNING" not in capfd.readouterr().err


def flip(path, at=0.5):
    data = bytearray(buckets.read(path))
    data[int(at * len(data))] ^= 16
    buckets.write(path, bytes(data))


def largest(directory):
    objects = {name: o for name, o in buckets.below(directory).items() if "/d/" in f"/{name}"}
    return directory / max(objects, key=lambda name: objects[name].size)


def damage(saved, kind):
    newest = saved / "6"
    if kind == "flipped bit":
        flip(largest(newest / "state"), 0.1)
    elif kind == "missing arrays":
        buckets.delete(largest(newest / "state"))
    elif kind == "flipped record":
        flip(newest / "record" / "metadata")
    elif kind == "missing record":
        buckets.delete(newest / "record" / "metadata")
    elif kind == "stale record":
        old = json.loads(buckets.read(newest / "record" / "metadata"))
        old["position"] = dict(place=5)
        del old["digest"]
        buckets.write(newest / "record" / "metadata", json.dumps(with_digest(old)).encode())
    elif kind == "arrays of another step":
        buckets.delete_below(newest / "state")
        for name in buckets.below(saved / "3" / "state"):
            buckets.copy(saved / "3" / "state" / name, newest / "state" / name)


@pytest.mark.parametrize(
    "kind",
    [
        "flipped bit",
        "missing arrays",
        "flipped record",
        "missing record",
        "stale record",
        "arrays of another step",
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_used(saved, kind, capfd):
    damage(saved, kind)
    check(restored(saved), 3)
    said = capfd.readouterr().err
    assert f"checkpoint {saved / '6'} is damaged" in said
    assert "training goes on from step 3" in said
    assert saved_steps(saved) == [3]
    assert buckets.below(saved.parent / "damaged" / "6")
    buckets.delete_below(saved.parent / "damaged")


def test_all_damaged(saved):
    for step in ("3", "6"):
        buckets.delete(saved / step / "record" / "metadata")
    with pytest.raises(CheckpointError, match="no checkpoint is left that can be read"):
        restored(saved)
    assert saved_steps(saved) == [3, 6]


def test_a_server_that_does_not_answer_is_no_damage(saved, monkeypatch):
    checkpoints = Checkpoints(saved, keep=2)
    asked = time.monotonic()

    def read(path):
        raise buckets.Unreachable(f"{path} cannot be reached")

    monkeypatch.setattr(buckets, "read", read)
    with pytest.raises(OSError, match="cannot be reached"):
        checkpoints.restore(state_of(0))
    monkeypatch.undo()
    checkpoints.close()
    assert saved_steps(saved) == [3, 6] and time.monotonic() - asked < 60
