"""Writes and reads weights larger than memory in an Orbax checkpoint, piece by piece.

Orbax itself reads and writes whole leaves, and a leaf of n-gram tables is six gigabytes. The
checkpoints written here are ordinary ones, which plain Orbax restores onto any mesh, but nothing
of a leaf is in memory except the slabs on their way to the disk.

Leaves are cut into chunks (see `chunk_shape`), each with a checksum: a piece is read whole or
not at all, never with other values than were written.
"""

import collections
import contextlib
import json
import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from bltjax.checkpoints.lazy_arrays import Index, LazyArray, blocks, tree_leaves
from bltjax.checkpoints.run_directory import COMMITTED, has_weights, saved_steps
from bltjax.runtime import buckets
from bltjax.runtime.checked_json import DIGEST, digest, without_digest
from bltjax.runtime.paths import absolute, is_remote, read_whole
from bltjax.runtime.plain_files import check_regular
from bltjax.runtime.progress import OnProgress
from bltjax.runtime.system_errors import first_line, without_numbers

CHUNK_BYTES = 4 * 2**20  # what is read at least
CHUNK_FEATURES = 256  # so that a host with a slice of the features reads little else
SLAB_BYTES = 32 * 2**20  # what is written at once, unless a chunk is larger
IN_FLIGHT_BYTES = 96 * 2**20  # slabs that wait for the disk
# Stored as they are: weights hardly compress. Orbax's default has no checksum.
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be read; names it and the remedy."""


def save_weights(directory: Path, tree: dict, on_progress: OnProgress = None) -> None:
    """Writes a nested dict of lazy arrays as an Orbax checkpoint.

    on_progress: called with the number of bytes of each write. The directory appears only when it
    is whole: a save that fails or is killed leaves a temporary directory beside it, which the next
    save to the same place replaces. Raises FileExistsError if there is something already, and
    OSError if the disk takes no more.
    """
    directory = absolute(directory)
    if is_remote(directory) and not has_weights(directory):
        buckets.delete_below(directory)  # what a killed process has left
    elif directory.exists():
        raise FileExistsError(f"{directory} exists: delete it or give another directory")
    ocp.Checkpointer(_handler(directory, on_progress)).save(
        directory, args=ocp.args.PyTreeSave(tree)
    )


def open_weights(directory: Path) -> dict:
    """Opens an Orbax checkpoint, whoever wrote it, as nested dict of lazy arrays; needs no devices.

    Raises FileNotFoundError if the directory is absent, and CheckpointError if it is damaged;
    a damaged piece raises CheckpointError when it is read.
    """
    directory = absolute(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no weights at {directory}: give a checkpoint's directory")
    return _open(directory, directory)


def open_state(checkpoint: Path) -> dict:
    """Opens the whole state in a checkpoint of training. Raises as `open_weights` does."""
    return _open(checkpoint / "state", checkpoint)


def open_params(checkpoints_directory: Path) -> dict:
    """Opens the parameters in the newest checkpoint of a training stage, as lazy arrays.

    The run may be in progress: nothing there is changed, and no optimizer state is read. A run
    deletes old checkpoints, and reading from a deleted one raises CheckpointError. A leaf has the
    `fingerprint` of what was saved (`weights.value_problems` compares). Raises FileNotFoundError if
    there is no checkpoint, CheckpointError if it is damaged.
    """
    directory = absolute(checkpoints_directory)
    if not (steps := saved_steps(directory)):
        raise FileNotFoundError(f"no checkpoint in {directory}: train that stage first")
    newest = directory / str(steps[-1])
    params = open_state(newest).get("params")
    if not isinstance(params, dict):
        raise _damaged(newest, "it holds no parameters")
    try:
        saved = read_record(newest)["arrays"]
        for path, leaf in tree_leaves(params):
            leaf.fingerprint = saved[".".join(("params", *path))]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(newest, first_line(error)) from error
    return params


def read_record(checkpoint: Path) -> dict:
    """Reads the record of a checkpoint: its step, position, and dtype and fingerprint of arrays.

    Raises ValueError where it is not as it was written, OSError where it is not there.
    """
    path = checkpoint / "record" / "metadata"
    check_regular(path)
    record = json.loads(read_whole(path))
    if DIGEST not in record:
        raise ValueError("its record of position and fingerprints has no digest")
    record = without_digest(record)
    if str(record["step"]) != checkpoint.name:
        raise ValueError(f"it is the checkpoint of step {record['step']} under another name")
    if is_remote(checkpoint):
        commit = json.loads(read_whole(checkpoint.with_name(checkpoint.name + COMMITTED)))
        if commit["record"] != digest(record):
            raise ValueError("its record is not the one that was committed with it")
    return record


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of the pieces of a stored leaf: one layer, some features, many rows.

    Layers and features are what meshes and readers divide; `CHUNK_BYTES` bounds the rows.
    """
    room = max(1, CHUNK_BYTES // itemsize)
    if len(shape) < 2:
        return tuple(min(size, room) for size in shape)
    *stack, rows, features = shape
    features = min(features, CHUNK_FEATURES)
    rows = min(rows, max(1, room // features))
    return (*(1 for _ in stack), rows, features)


class _LazyHandler(ocp.type_handlers.TypeHandler):
    """Orbax's handler of lazy leaves: writes them, and opens stored ones without reading them.

    Orbax calls these methods in an event loop, but nothing is awaited: after an error, futures
    that are still awaited would each print a traceback when the loop closes.
    """

    def __init__(self, typestr: str, checkpoint: Path, on_progress: OnProgress):
        self._typestr, self._checkpoint, self._on_progress = typestr, checkpoint, on_progress

    def typestr(self) -> str:
        return self._typestr

    async def serialize(self, values: list[LazyArray], infos, args=None):
        writes, held = collections.deque(), 0
        try:
            for value, info in zip(values, infos, strict=True):
                store = _create(info, value)
                chunk = chunk_shape(store.shape, value.dtype.itemsize)  # none is written twice
                for index in blocks(value, SLAB_BYTES, chunk):
                    slab = np.asarray(value[index])
                    while writes and held + slab.nbytes > IN_FLIGHT_BYTES:
                        held -= self._finish(*writes[0])
                        writes.popleft()
                    write = store[index].write(slab, can_reference_source_data_indefinitely=True)
                    writes.append((write, slab.nbytes, info.parent_dir))
                    held += slab.nbytes
            for entry in writes:
                self._finish(*entry)
        except BaseException:  # what is under way would write into a directory that is removed
            for write, *_ in writes:
                with contextlib.suppress(Exception):
                    write.result()
            raise
        return []

    def _finish(self, write: tensorstore.WriteFutures, num_bytes: int, directory: Path) -> int:
        with _disk_errors(directory):
            write.result()
        if self._on_progress:
            self._on_progress(num_bytes)
        return num_bytes

    async def metadata(self, infos):
        specs = [ocp.type_handlers.get_json_tspec_read(i, i.is_ocdbt_checkpoint) for i in infos]
        opening = [
            tensorstore.open(spec, open=True, read=True, context=info.ts_context)
            for spec, info in zip(specs, infos, strict=True)
        ]
        return [_Stored(future.result(), self._checkpoint) for future in opening]

    async def deserialize(self, infos, args=None):
        return await self.metadata(infos)


class _Stored:
    """A leaf of a checkpoint as a lazy array."""

    def __init__(self, store: tensorstore.TensorStore, checkpoint: Path):
        self._store, self._checkpoint = store, checkpoint
        self.fingerprint: int | None = None  # of what was saved, where that is known
        self.shape, self.dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)

    def __getitem__(self, index: Index) -> np.ndarray:
        try:
            return self._store[index].read().result()
        except Exception as error:  # whatever the decoders say of damaged bytes
            raise _damaged(self._checkpoint, first_line(error)) from error


def _create(info, value: LazyArray) -> tensorstore.TensorStore:
    """Creates an empty leaf in the checkpoint that Orbax is writing."""
    shape = tuple(value.shape)
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=True,
        global_shape=shape,
        local_shape=chunk_shape(shape, value.dtype.itemsize),
        dtype=value.dtype,
        process_index=0,
    )
    spec["metadata"]["codecs"] = CODECS
    with _disk_errors(info.parent_dir):
        return tensorstore.open(spec, create=True, open=True, context=info.ts_context).result()


@contextlib.contextmanager
def _disk_errors(directory: Path):
    """Raises OSError for a failed write, and only for it: reading the arrays may fail as well."""
    try:
        yield
    except Exception as error:  # its message ends with that of the operating system
        reason = first_line(error).rpartition(": ")[2]
        raise OSError(
            f"cannot write {directory} ({reason}): free some disk space and delete it"
        ) from error


def _open(directory: Path, checkpoint: Path) -> dict:
    """Opens a directory that belongs to a checkpoint, which errors name."""
    try:
        if not _is_finished(checkpoint):
            raise ValueError("the process that wrote it did not finish")
        return _handler(checkpoint).metadata(directory).tree
    except Exception as error:  # Orbax raises bare Exceptions for damaged files
        raise _damaged(checkpoint, first_line(error)) from error


def _is_finished(checkpoint: Path) -> bool:
    if is_remote(checkpoint):
        return has_weights(checkpoint)
    return ocp.utils.is_checkpoint_finalized(checkpoint)


def _damaged(checkpoint: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {checkpoint} cannot be read ({without_numbers(reason)}); delete it and write "
        "it again"
    )


def _handler(checkpoint: Path, on_progress: OnProgress = None) -> ocp.CheckpointHandler:
    """Returns Orbax's handler of nested dicts, with the class above for every leaf."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs dozens of lines a save
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, _LazyHandler("jax.Array", checkpoint, on_progress)),
        (object, _LazyHandler("np.ndarray", checkpoint, on_progress)),  # what lazy arrays become
    )
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry,
        use_zarr3=True,  # the older format has no checksums
        enable_pinned_host_transfer=False,  # not to look for devices
    )
