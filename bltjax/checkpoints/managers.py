"""Writes checkpoints in the background and deletes old ones: on a disk, or in a bucket.

On a disk Orbax's CheckpointManager does it. In a bucket, where directories cannot be renamed and
every look is a request, the same arrays are written by Orbax into their place, then

    STEP/record/metadata      our record
    STEP/commit_success.txt   with which Orbax takes the checkpoint for whole
    STEP.committed            with which we do: the digest of the record

in this order. Directories of steps that have no STEP.committed are what a killed run has left.
"""

import asyncio
import functools
import itertools
import json
import logging
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from bltjax import sharding
from bltjax.checkpoints.run_directory import COMMITTED, COMMITTED_WEIGHTS, is_step, saved_steps
from bltjax.runtime import buckets, leases, peers
from bltjax.runtime.checked_json import DIGEST
from bltjax.runtime.paths import is_remote
from bltjax.runtime.system_errors import first_line, is_of_network

BARRIER_SECONDS = 3600  # that the writes of processes may differ
_saves = itertools.count()  # of this process, the same in all of them


def manager_of(directory: Path, keep: int, keep_every: int):
    """Returns what writes the checkpoints of a directory: the newest `keep`, and multiples.

    keep_every: steps; 0 for none. Raises OSError where the directory cannot be written.
    """
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    _forget_late_writes()
    if is_remote(directory):
        return BucketManager(directory, keep, keep_every)
    return disk_manager(directory, keep, keep_every)


class DiskManager(ocp.CheckpointManager):
    """Orbax's manager of checkpoints, with `failure` set as soon as a write fails.

    In several processes Orbax itself raises the error only after its thread has waited, up to 20
    minutes, for the processes that did not fail.
    """

    failure: Exception | None = None

    def _wait_for_checkpointers(self):
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise

    def write(self, step: int, state: ocp.args.StandardSave, record: dict):
        """Starts to write a checkpoint."""
        both = ocp.args.Composite(state=state, record=ocp.args.JsonSave(record))
        self.save(step, force=True, args=both)

    def move(self, step: int, target: Path):
        """Moves a checkpoint elsewhere."""
        target.parent.mkdir(exist_ok=True)
        shutil.move(Path(self.directory) / str(step), target)


def disk_manager(directory: Path, keep: int, keep_every: int) -> DiskManager:
    """Returns the manager of a directory on a disk, which is made. Raises OSError."""
    policies = [LatestN(keep)] + [EveryNSteps(keep_every)] * bool(keep_every)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies),
        step_name_format=_StepNames(),
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # garbage in an old checkpoint must not matter
        # Threads that write would wait 20 minutes for directories that cannot be made.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    directory.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        tempfile.TemporaryFile(dir=directory).close()
    return DiskManager(directory, options=options)


class BucketManager:
    """Writes checkpoints in a bucket; one run at a time, which has the working directory's lease.

    Each process writes its own part; the first one commits what all have written, and reads none
    of it back.
    """

    def __init__(self, directory: Path, keep: int, keep_every: int):
        self.failure: Exception | None = None
        self._directory, self._keep, self._keep_every = directory, keep, keep_every
        self._handler = ocp.StandardCheckpointHandler()
        self._thread: threading.Thread | None = None
        self._steps: list[int] = []
        if jax.process_index() == 0:
            self._remove_unfinished()
        sharding.barrier("what was half written is removed")
        self.reload()

    def reload(self):
        """Looks which checkpoints are there."""
        self._steps = saved_steps(self._directory)

    def all_steps(self) -> list[int]:
        """Returns the steps that are saved, or being saved."""
        return list(self._steps)

    def latest_step(self) -> int | None:
        return max(self._steps, default=None)

    def write(self, step: int, state: ocp.args.StandardSave, record: dict):
        """Starts to write a checkpoint: returns when the arrays may change again."""
        self.wait_until_finished()
        target = self._directory / str(step) / "state"
        try:
            writes = asyncio.run(self._handler.async_save(target, args=state)) or []
        except Exception as error:
            if is_of_network(error):
                raise OSError(first_line(error)) from error
            raise
        work = functools.partial(self._finish, step, writes, record, next(_saves))
        self._thread = threading.Thread(target=self._keep_failure, args=(work,), daemon=True)
        self._steps.append(step)
        self._thread.start()

    def is_saving_in_progress(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait_until_finished(self):
        """Waits until the last checkpoint is there. Raises OSError where it was not written."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        if self.failure:
            raise self.failure

    def close(self):
        self.wait_until_finished()

    def move(self, step: int, target: Path):
        """Moves a checkpoint elsewhere in its bucket, object by object."""
        buckets.delete(self._commit(step))
        buckets.move_below(self._directory / str(step), target)

    def _keep_failure(self, work: Callable[[], None]):
        try:
            work()
        except OSError as error:
            self.failure = error
        except Exception as error:  # TensorStore has ValueErrors, libraries below it any
            self.failure = OSError(first_line(error))
            self.failure.__cause__ = error

    def _finish(self, step: int, writes: list, record: dict, number: int):
        for write in writes:
            write.result()
        _meet(f"checkpoint {number} is written")
        if jax.process_index() == 0:
            checkpoint = self._directory / str(step)
            self._handler.finalize(checkpoint / "state")
            buckets.write(checkpoint / "record" / "metadata", json.dumps(record).encode())
            buckets.write(checkpoint / COMMITTED_WEIGHTS, b"")
            commit = dict(step=step, record=record[DIGEST])
            leases.confirm()  # a process that was suspended may have lost its place
            buckets.write(self._commit(step), json.dumps(commit).encode(), generation=0)
        _meet(f"checkpoint {number} is committed")
        for old in self._superseded():
            if jax.process_index() == 0:
                buckets.delete(self._commit(old))
                buckets.delete_below(self._directory / str(old))
            self._steps.remove(old)

    def _superseded(self) -> list[int]:
        newest = sorted(self._steps)[-self._keep :]
        every = self._keep_every
        return [s for s in self._steps if s not in newest and not (every and s % every == 0)]

    def _commit(self, step: int | str) -> Path:
        return self._directory / f"{step}{COMMITTED}"

    def _remove_unfinished(self):
        objects, folders = buckets.entries(self._directory)
        for name in filter(is_step, folders):
            if name + COMMITTED not in objects:
                buckets.delete_below(self._directory / name)
        for name in (n.removesuffix(COMMITTED) for n in objects if n.endswith(COMMITTED)):
            if is_step(name) and name not in folders:
                buckets.delete(self._commit(name))


def _meet(what: str):
    """Waits for the threads of all processes that write a checkpoint."""
    if jax.process_count() > 1:
        peers.client().wait_at_barrier(f"bltjax: {what}", 1000 * BARRIER_SECONDS)


class _StepNames(ocp.path.step.NameFormat):
    """Names of checkpoints for Orbax, which takes any number for a step and keeps the largest."""

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path):
        return (self.find_step(base_path, step) for step in saved_steps(Path(base_path)))

    def find_step(self, base_path, step: int):
        return ocp.path.step.Metadata(step=step, path=epath.Path(base_path) / str(step))


@functools.cache  # once for a process
def _forget_late_writes():
    """Drops the tracebacks of writes that end after another one has failed.

    Orbax raises the first error and closes its event loop. For each write that was still under way
    TensorStore finds the loop closed, or asyncio that nobody asked for its error, and either prints
    a traceback.
    """
    never = "exception was never retrieved"
    logging.getLogger("asyncio").addFilter(lambda message: never not in message.getMessage())
    shown = sys.unraisablehook

    def show(unraisable):
        late = unraisable.object is None and isinstance(unraisable.exc_value, RuntimeError)
        if not (late and "Event loop is closed" in str(unraisable.exc_value)):
            shown(unraisable)

    sys.unraisablehook = show


def _is_not_of_orbax(message: logging.LogRecord) -> bool:
    """Filters Orbax's log: dozens of lines a save, and tracebacks of errors it raises as well."""
    return "/orbax/" not in message.pathname
