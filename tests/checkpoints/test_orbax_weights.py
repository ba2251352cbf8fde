"""Weights of any size go to the disk and back bit for bit, or an error says what is wrong."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings

from bltjax import sharding
from bltjax.checkpoints import lazy_arrays, orbax_weights, placing
from bltjax.checkpoints.orbax_weights import open_params, open_weights, save_weights
from bltjax.checkpoints.training_state import CheckpointError, Checkpoints
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    HashConfig,
    OptimizerConfig,
    TransformerConfig,
)
from bltjax.model import functional
from bltjax.training.optimizer import make_optimizer
from bltjax.training.state import create_state

pytestmark = pytest.mark.long  # one interpreter will do

ROOT = Path(__file__).parents[2]
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
BF16 = np.dtype(ml_dtypes.bfloat16)
ENTROPY = EntropyModelConfig(TransformerConfig(dim=8, num_heads=1, window=8, ffn_multiple_of=8))


def stack(dim, layers, heads, **values):
    return TransformerConfig(dim=dim, num_layers=layers, num_heads=heads, **values)


BLT = BLTConfig(
    local_encoder=stack(16, 1, 2, window=6, ffn_multiple_of=16),
    global_transformer=stack(24, 2, 2, ffn_multiple_of=16),
    local_decoder=stack(16, 2, 2, window=6, ffn_multiple_of=16),
    cross_attention=CrossAttentionConfig(num_heads=2),
    hash=HashConfig((2, 3), 1009),
)


def limits(patch, chunk=2048, features=8, slab=8192, in_flight=16384):
    """Limits so small that little weights are many chunks and slabs."""
    patch.setattr(orbax_weights, "CHUNK_BYTES", chunk)
    patch.setattr(orbax_weights, "CHUNK_FEATURES", features)
    patch.setattr(orbax_weights, "SLAB_BYTES", slab)
    patch.setattr(orbax_weights, "IN_FLIGHT_BYTES", in_flight)


@pytest.fixture
def small_limits(monkeypatch):
    limits(monkeypatch)


def random_bits(rng, shape, dtype):
    """Any bits: NaNs with payloads, infinities and denormals too."""
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def example_tree():
    rng = np.random.default_rng(0)
    return {
        "table": random_bits(rng, (2, 500, 20), BF16),
        "norm": {"weight": random_bits(rng, (70,), DTYPES[0]), "scale": np.float32(3).reshape(())},
    }


def assert_same(found, expected):
    """Two trees, the first of them lazy, hold the same bits."""
    found, expected = dict(lazy_arrays.tree_leaves(found)), dict(lazy_arrays.tree_leaves(expected))
    assert found.keys() == expected.keys()
    for path, array in found.items():
        whole = lazy_arrays.read_all(array)
        assert (array.shape, array.dtype) == (expected[path].shape, expected[path].dtype), path
        assert (whole.shape, whole.dtype) == (array.shape, array.dtype), path
        assert whole.tobytes() == np.asarray(expected[path]).tobytes(), path


def listing(directory):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in [directory, *directory.rglob("*")]}


SHAPES = st.lists(st.integers(1, 9), max_size=4).map(tuple) | st.tuples(st.integers(1, 300))


@settings(max_examples=15)
@given(
    leaves=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=4),
    sizes=st.tuples(
        st.integers(1, 64), st.integers(1, 5), st.integers(1, 200), st.integers(1, 400)
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_is_bitwise(leaves, sizes, seed, tmp_path_factory):
    rng = np.random.default_rng(seed)
    arrays = [random_bits(rng, shape, dtype) for shape, dtype in leaves]
    tree = {"first": arrays[0], "rest": {str(i): array for i, array in enumerate(arrays[1:])}}
    tree = {key: value for key, value in tree.items() if not isinstance(value, dict) or value}
    directory, written = tmp_path_factory.mktemp("weights") / "new" / "weights", []
    with pytest.MonkeyPatch.context() as patch:
        limits(patch, *sizes)
        save_weights(directory, tree, written.append)
    assert sum(written) == sum(array.nbytes for array in arrays)
    found = open_weights(directory)
    assert_same(found, tree)
    ends = [np.sort(rng.integers(0, n, 2)) for n in arrays[0].shape]
    index = tuple(slice(int(first), int(last) + 1) for first, last in ends)
    assert found["first"][index].tobytes() == arrays[0][index].tobytes()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "shape", [(6, 500_002, 1024), (25, 2048, 2048), (260, 4096), (32, 1024), (2048,), (9**8,), ()]
)
def test_slabs_are_whole_chunks_of_bounded_size(shape, itemsize):
    chunk = orbax_weights.chunk_shape(shape, itemsize)
    assert len(chunk) == len(shape)
    assert np.prod(chunk) * itemsize <= orbax_weights.CHUNK_BYTES
    assert len(shape) < 3 or chunk[0] == 1
    assert len(shape) < 2 or chunk[-1] <= 256
    covered = 0
    array = np.broadcast_to(np.zeros((), f"V{itemsize}"), shape)
    for index in lazy_arrays.blocks(array, orbax_weights.SLAB_BYTES, chunk):
        size = np.prod([s.stop - s.start for s in index])
        assert size * itemsize <= orbax_weights.SLAB_BYTES
        assert all(
            s.start % c == 0 and (s.stop % c == 0 or s.stop == n)
            for s, c, n in zip(index, chunk, shape, strict=True)
        )
        covered += size
    assert covered == np.prod(shape)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_weights_reach_every_mesh_through_orbax_and_through_us(
    sizes, use_mesh, tmp_path, small_limits
):
    rng = np.random.default_rng(0)
    with use_mesh(*sizes):
        abstract = sharding.concrete(functional.abstract_params(BLT))
        tree = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)
        save_weights(tmp_path / "weights", tree)
        orbax = ocp.StandardCheckpointer()
        for placed in (
            orbax.restore(tmp_path / "weights", abstract),
            placing.put_lazy(open_weights(tmp_path / "weights"), functional.abstract_params(BLT)),
        ):
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), tree)
            jax.tree.map(
                lambda x, a: np.testing.assert_equal(x.sharding, a.sharding), placed, abstract
            )
        orbax.close()
    if sizes == (1, 1, 1):  # and without being told what is there
        assert_same(ocp.PyTreeCheckpointer().restore(tmp_path / "weights"), tree)


class Counted:
    """A lazy array that keeps the number of bytes of each piece that is read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __getitem__(self, index):
        piece = self.array[index]
        self.read.append(piece.nbytes)
        return piece


def test_little_waits_for_the_disk(tmp_path, small_limits):
    arrays = [Counted(np.ones(300 * n, np.float32)) for n in range(1, 40)]
    written, waiting = [], []

    def on_progress(num_bytes):
        written.append(num_bytes)
        waiting.append(sum(sum(array.read) for array in arrays) - sum(written))

    save_weights(
        tmp_path / "weights", {str(i): array for i, array in enumerate(arrays)}, on_progress
    )
    assert waiting[-1] == 0
    assert 0 < max(waiting) <= orbax_weights.IN_FLIGHT_BYTES + orbax_weights.SLAB_BYTES
    assert sum(written) > 20 * max(waiting)


def test_everything_is_read_once_and_in_blocks(use_mesh, monkeypatch):
    monkeypatch.setattr(lazy_arrays.blocks, "__defaults__", (256, None))
    values = np.random.default_rng(0).normal(size=(3, 16, 24)).astype(np.float32)
    arrays = {name: Counted(values) for name in ("divided", "replicated")}
    with use_mesh(2, 2, 2):
        mesh = jax.sharding.get_mesh()
        specs = {"divided": sharding.spec(None, "embed", "heads"), "replicated": jax.P()}
        abstract = {
            name: jax.ShapeDtypeStruct(values.shape, BF16, sharding=jax.NamedSharding(mesh, axes))
            for name, axes in specs.items()
        }
        placed = placing.put_lazy(arrays, abstract)
    for name, array in placed.items():
        np.testing.assert_array_equal(jax.device_get(array), values.astype(BF16))
        assert sum(arrays[name].read) == values.nbytes
        assert max(arrays[name].read) <= 512  # blocks of the result's dtype, half as wide
    assert placed["divided"].addressable_shards[0].data.size == values.size // 4


def test_weights_of_another_model_are_named():
    def abstract(*names):
        return {name: jax.ShapeDtypeStruct((2, 3), np.float32) for name in names}

    weights = {"wq": np.zeros((2, 4), np.float32), "wv": np.zeros((2, 3), np.float32)}
    with pytest.raises(ValueError, match=r"wq is \(2, 4\) instead of \(2, 3\); wk is missing"):
        placing.put_lazy(weights, abstract("wq", "wk", "wv"))
    with pytest.raises(ValueError, match=r"b is missing.* and 2 more; give the configuration"):
        placing.put_lazy(weights, abstract(*"abc"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of steps 1 and 2 of a training run, and the parameters of the latter."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        checkpoints = Checkpoints(directory, keep=2)
        for step in (1, 2):
            state = create_state(ENTROPY, make_optimizer(OptimizerConfig(), 10), seed=step)
            checkpoints.save(step, state, {"epoch": 0})
        checkpoints.close()
        return directory, jax.device_get(state.params)


def test_parameters_of_a_run_in_progress(run):
    """They are those of the newest whole checkpoint, and nothing in the directory changes."""
    directory, params = run
    unfinished = directory / "3.orbax-checkpoint-tmp" / "state"
    unfinished.mkdir(parents=True, exist_ok=True)
    before = listing(directory)
    assert_same(open_params(directory), params)
    assert listing(directory) == before


def test_no_checkpoint_yet(tmp_path):
    (tmp_path / "1.orbax-checkpoint-tmp").mkdir()
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=f"{directory}: train that stage first"):
            open_params(directory)
    assert not (tmp_path / "absent").exists()


def test_what_is_no_training_state(tmp_path):
    (tmp_path / "30").mkdir()
    with pytest.raises(CheckpointError, match=r"/30 cannot be read .*; delete it"):
        open_params(tmp_path)
    save_weights(tmp_path / "31" / "state", {"weights": np.ones(3)})
    with pytest.raises(CheckpointError, match="no parameters"):
        open_params(tmp_path)


def test_places_that_are_taken_or_empty(tmp_path):
    with pytest.raises(FileExistsError, match=f"{tmp_path} exists: delete it"):
        save_weights(tmp_path, example_tree())
    with pytest.raises(FileNotFoundError, match="absent: give"):
        open_weights(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="delete it and write it again"):
        open_weights(tmp_path)
    save_weights(tmp_path / "weights", example_tree())
    unfinished = (tmp_path / "weights").rename(tmp_path / "weights.orbax-checkpoint-tmp")
    with pytest.raises(CheckpointError, match="did not finish"):
        open_weights(unfinished)


class Unreadable:
    shape, dtype = (4, 3), np.dtype(np.float32)

    def __getitem__(self, index):
        raise CheckpointError("the file that was to be converted is damaged")


def test_errors_while_saving(tmp_path):
    """An array's own errors stay what they are; the disk's name the directory and the remedy."""
    with pytest.raises(CheckpointError, match="to be converted"):
        save_weights(tmp_path / "weights", {"ok": np.ones(3), "bad": Unreadable()})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"weights\S* \(File too large.*\): free some disk space"):
            save_weights(tmp_path / "weights", {"large": np.ones((100, 100))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    save_weights(tmp_path / "weights", example_tree())
    assert_same(open_weights(tmp_path / "weights"), example_tree())


DAMAGES = {
    "removed": lambda data: None,
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "overwritten": lambda data: np.random.default_rng(0).bytes(len(data)),
    "a bit flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
}


def read_or_refuse(read, checkpoint, directory, damage, expected):
    """With each file damaged in turn `read` is exact or raises CheckpointError; how many did."""
    refused = 0
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        data = path.read_bytes()
        damaged = damage(data)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        try:
            assert_same(read(), expected)
        except CheckpointError as error:
            assert f"{checkpoint} cannot be read (" in str(error) and "delete it" in str(error)
            assert "\n" not in str(error)
            refused += 1
        path.write_bytes(data)
    assert_same(read(), expected)
    return refused


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused(damage, tmp_path, small_limits, capfd):
    directory = tmp_path / "weights"
    save_weights(directory, example_tree())
    refused = read_or_refuse(
        lambda: open_weights(directory), directory, directory, DAMAGES[damage], example_tree()
    )
    assert refused >= 3
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"a bit flipped"}))
def test_damaged_runs_are_refused(damage, run, capfd):
    """Training's checkpoints have no checksums: a flipped bit may go unnoticed."""
    directory, params = run
    newest = directory / "2"
    refused = read_or_refuse(
        lambda: open_params(directory), newest, newest / "state", DAMAGES[damage], params
    )
    assert refused >= 3
    assert "Traceback" not in capfd.readouterr().err


COMPUTED = """
import sys, time
from pathlib import Path
import ml_dtypes, numpy as np
from bltjax.checkpoints import lazy_arrays as lazy
from bltjax.checkpoints import orbax_weights as weights_on_disk

class Computed:
    '''Values that depend on their place, and are nowhere until they are read.'''
    dtype = np.dtype(ml_dtypes.bfloat16)
    values = np.arange(256, dtype=np.uint16) * 97

    def __init__(self, *shape, wait=lambda: None):
        self.shape, self.wait = shape, wait

    def __getitem__(self, index):
        self.wait()
        layer, row, column = (np.arange(s.start, s.stop).astype(np.uint8) for s in index)
        mixed = (layer * 13)[:, None, None] + (row * 31)[:, None] + column * 7
        return self.values[mixed].view(self.dtype)

def peak():
    '''MiB of memory that this program has used at most.'''
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) // 1024

directory = Path(sys.argv[1])
"""


def start(code, directory, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", COMPUTED + code, str(directory)],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_killed_save_leaves_nothing_that_opens(tmp_path):
    code = """
weights_on_disk.IN_FLIGHT_BYTES = weights_on_disk.SLAB_BYTES
print('ready', flush=True)
weights_on_disk.save_weights(directory, {
    'written': np.ones(1000), 'table': Computed(2, 20_000, 1024, wait=lambda: time.sleep(0.2))
}, lambda num_bytes: print(num_bytes, flush=True))
"""
    process = start(code, tmp_path / "weights")
    while process.stdout.readline() not in (f"{32 * 2**20}\n", ""):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["weights.orbax-checkpoint-tmp"]
    with pytest.raises(FileNotFoundError):
        open_weights(tmp_path / "weights")
    for unfinished in [path for path in tmp_path.rglob("*") if path.is_dir()]:
        with pytest.raises(CheckpointError):
            open_weights(unfinished)
    save_weights(tmp_path / "weights", example_tree())
    assert_same(open_weights(tmp_path / "weights"), example_tree())
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_leaf_of_a_gigabyte_takes_little_memory(tmp_path):
    """Written by one process, read by another that could not even start a device, and placed on
    a device by a third, which keeps no second copy."""
    leaf = "Computed(2, 250_000, 1024)"
    write = f"weights_on_disk.save_weights(directory, {{'table': {leaf}}}); print(peak())"
    read = f"""
expected, found = {leaf}, weights_on_disk.open_weights(directory)['table']
assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
for index in lazy.blocks(found):
    assert np.array_equal(found[index].view(np.uint16), expected[index].view(np.uint16))
print(peak())
"""
    place = f"""
import jax
from bltjax import sharding
table = jax.ShapeDtypeStruct({leaf}.shape, Computed.dtype)
with jax.set_mesh(sharding.make_mesh()):
    sharding.put_lazy(weights_on_disk.open_weights(directory), {{'table': table}})
print(peak())
"""
    for code, platform, limit in (
        (write, "cpu", 700),
        (read, "nowhere", 700),
        (place, "cpu", 977 + 700),
    ):
        process = start(code, tmp_path / "weights", JAX_PLATFORMS=platform)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        assert int(output) < limit, output
