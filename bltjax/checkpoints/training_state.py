"""Checkpoints: the training state and the data position, saved together and checked when read.

    directory/STEP/state/            the arrays, as Orbax stores them
    directory/STEP/record/metadata   position, and dtype, shape and fingerprint of every array
    damaged/STEP                     beside the directory: checkpoints that were found damaged

Three checks guard a checkpoint, and each catches a fault that the others miss:

    Orbax's commit         a process or machine that dies while it writes: a checkpoint gets the
                           name of its step when it is whole, other directories are removed
    array fingerprints     files of the arrays that are changed, cut, missing or of another array,
                           and arrays changed on the way to the disk or back: what is on the
                           devices after reading is compared with what was there before saving
    digest of the record   a changed position or fingerprint, where the record is still JSON

In a bucket STEP.committed beside the directory stands for Orbax's commit (managers.py). It holds
the digest of the record, so that an older record in the place of the newest is noticed.

The record also holds the step, which a directory copied or renamed does not match. Files that
nobody reads may be damaged: what is restored is right all the same. Checkpoints before version 0.2
hold the size and CRC-32 of every file too (FILES.json), which is ignored: it caught nothing else.
"""

import contextlib
import errno
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from bltjax import sharding
from bltjax.checkpoints import placing
from bltjax.checkpoints.fingerprints import leaf_fingerprints, named_leaves
from bltjax.checkpoints.managers import manager_of
from bltjax.checkpoints.orbax_weights import (
    CHUNK_BYTES,
    CheckpointError,
    open_state,
    read_record,
)
from bltjax.checkpoints.run_directory import saved_steps
from bltjax.runtime.checked_json import with_digest
from bltjax.runtime.files import free_name, place_of
from bltjax.runtime.paths import absolute
from bltjax.runtime.system_errors import (
    first_line,
    is_of_disk,
    other_fault,
    unwritable,
    without_numbers,
)

DAMAGED = "damaged"
PACKAGES = ("bltjax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
REASON_BYTES = 240  # of the reason that a process tells the others
LOOK_SECONDS = 0.1  # between looks for a failed write, in several processes


class Restored(NamedTuple):
    state: Any
    position: dict
    step: int


class _Damaged(Exception):
    """Raised on all processes alike for a checkpoint that is not as it was written."""


class Checkpoints:
    """The checkpoints of one training stage: the newest `keep`, and multiples of `keep_every`.

    keep_every: steps; 0 for none. about: JSON values that are written into every checkpoint, for
    people to read. Raises OSError where the directory cannot be written.
    """

    def __init__(
        self, directory: Path, keep: int = 1, keep_every: int = 0, about: dict | None = None
    ):
        self.directory = absolute(directory)
        self._about = about or {}
        try:
            self._manager = manager_of(self.directory, keep, keep_every)
            self._place = place_of(self.directory)
        except OSError as error:
            raise unwritable(self.directory, error) from error
        self._saving: int | None = None  # the step, until an error of it has been told

    def save(self, step: int, state, position: dict):
        """Starts to save in the background, unless that step is there.

        The next `save`, `wait` or `close` raises OSError where it fails; older checkpoints are kept
        then.
        """
        self.wait()
        if step in self._agreed_steps():
            return
        record = dict(
            step=step, position=position, about=self._about | _versions(), arrays=_arrays(state)
        )
        small_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
        with self._disk_errors(step):
            if place_of(self.directory) != self._place:
                raise _vanished()  # Orbax would make another, and others be lost unseen
            arrays = ocp.args.StandardSave(state, save_args=small_chunks)
            self._manager.write(step, arrays, with_digest(record))
        self._saving = step

    def all_steps(self) -> list[int]:
        """Returns the steps that are saved, or being saved."""
        return list(self._manager.all_steps())

    def _agreed_steps(self) -> list[int]:
        """Returns the steps that process 0 sees: on a shared disk others may see older ones."""
        steps = np.array(self.all_steps(), np.int32)
        if jax.process_count() > 1:
            number = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
            steps = multihost_utils.broadcast_one_to_all(np.resize(steps, number))
        return steps.tolist()

    def restore(self, abstract_state) -> Restored | None:
        """Reads the newest checkpoint that is whole, sharded as `abstract_state` says.

        Returns None without any checkpoint. Newer ones that are damaged are moved to the directory
        `damaged`, with warnings on stderr. Raises CheckpointError if all are damaged, or if one is
        of another model, and moves nothing then.
        """
        self.wait()
        damaged = {}
        for step in sorted(self._agreed_steps(), reverse=True):
            try:
                state, record = _read(self.directory / str(step), abstract_state)
            except _Damaged as error:
                damaged[step] = str(error)
                continue
            if damaged:
                self._move_away(damaged, step)
            return Restored(state, record["position"], step)
        if damaged:
            reasons = "; ".join(f"{self.directory / str(s)}: {why}" for s, why in damaged.items())
            raise CheckpointError(
                f"no checkpoint is left that can be read ({reasons}); move {self.directory} away "
                "to start this stage anew"
            )
        return None

    def _move_away(self, damaged: dict[int, str], good: int):
        if jax.process_index() == 0:
            for step, reason in damaged.items():
                source = self.directory / str(step)
                target = free_name(self.directory.parent / DAMAGED / str(step))
                self._manager.move(step, target)
                print(
                    f"WARNING: checkpoint {source} is damaged: {reason}\n"
                    f"WARNING: it was moved to {target}; nothing was deleted",
                    file=sys.stderr,
                )
            print(
                f"WARNING: training goes on from step {good}: what came after it is trained again",
                file=sys.stderr,
                flush=True,
            )
        sharding.barrier("damaged checkpoints are moved")
        self._manager.reload()

    def wait(self):
        """Waits until the last save is on disk. Raises OSError if it could not be written."""
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        with self._disk_errors(step):
            while jax.process_count() > 1 and self._manager.is_saving_in_progress():
                if self._manager.failure:
                    raise self._manager.failure  # whose thread goes on waiting for the others
                time.sleep(LOOK_SECONDS)
            self._manager.wait_until_finished()

    def close(self):
        """Waits as `wait` does, and ends the threads."""
        try:
            self.wait()
        finally:
            if jax.process_count() == 1 or not self._manager.failure:
                with contextlib.suppress(OSError):  # which `save` or `wait` has raised already
                    self._manager.close()

    @contextlib.contextmanager
    def _disk_errors(self, step: int):
        """Turns errors of the disk into an OSError of one line; TensorStore has ValueErrors."""
        try:
            yield
        except (OSError, ValueError) as failure:
            error = failure if place_of(self.directory) == self._place else _vanished()
            if isinstance(error, ValueError) and not is_of_disk(error):
                raise
            with contextlib.suppress(OSError):
                self._manager.reload()  # it has forgotten those that the new one was to replace
            newest = self._manager.latest_step()
            rest = ": it starts anew" if newest is None else f": it goes on from step {newest}"
            raise unwritable(self.directory / str(step), error, rest) from error


def load_params(directory: Path, abstract_params: dict) -> dict:
    """Reads the parameters in the newest checkpoint of a stage, onto the mesh that is set.

    Raises FileNotFoundError if there is none, CheckpointError if it is damaged or of another model.
    """
    directory = absolute(directory)
    if not (steps := saved_steps(directory)):
        raise FileNotFoundError(f"no checkpoint in {directory}: train that stage first")
    *older, newest = steps
    try:
        state, _ = _read(directory / str(newest), {"params": abstract_params}, "params.")
    except _Damaged as error:
        remedy = (
            f"run its stage again: it goes on from step {older[-1]}"
            if older
            else f"move {directory} away and run its stage again"
        )
        raise CheckpointError(
            f"checkpoint {directory / str(newest)} is damaged: {error}; {remedy}"
        ) from error
    return state["params"]


def _read(checkpoint: Path, abstract, prefix: str = "") -> tuple[Any, dict]:
    """Returns the state in a checkpoint, on the devices as `abstract` says, and its record.

    prefix: how the paths of the wanted arrays begin. Raises _Damaged, and CheckpointError for
    another model.
    """
    wanted = named_leaves(abstract)
    record = _together(lambda: read_record(checkpoint))
    saved = {k: v for k, v in record["arrays"].items() if k.startswith(prefix)}
    _check_model(checkpoint, saved, wanted)
    arrays = _together(lambda: _placed(checkpoint, wanted))
    found = leaf_fingerprints(arrays)
    _together(lambda: _check_values({name: found[name] for name in wanted}, saved))
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[n] for n in wanted]), record


def _check_values(found: dict[str, int], saved: dict):
    wrong = [name for name, number in found.items() if number != saved[name]["fingerprint"]]
    if wrong:
        raise ValueError(f"{wrong[0]} has other values than were saved ({len(wrong)} arrays)")


def _check_model(checkpoint: Path, saved: dict, wanted: dict):
    given = {name: _kind(x["dtype"], x["shape"]) for name, x in saved.items()}
    asked = {name: _kind(x.dtype, x.shape) for name, x in wanted.items()}
    if found := placing.differing(given, asked):
        raise CheckpointError(
            f"checkpoint {checkpoint} is of another model: {found}; give the configuration that it "
            "was trained with, or another directory"
        )


def _placed(checkpoint: Path, wanted: dict) -> dict:
    # Not by Orbax's own way to read: it casts, and where one process fails the others wait for it.
    stored = named_leaves(open_state(checkpoint))
    return placing.put_lazy({name: stored[name] for name in wanted}, wanted)


def _together(work: Callable):
    """Returns work()'s result, if every process has one; raises _Damaged on all of them else.

    Errors that are not the checkpoint's fault, such as no memory, come through as they are.
    """
    result, reason = None, ""
    try:
        result = work()
    except Exception as error:  # Orbax raises bare Exceptions for damaged files
        if other := other_fault(error):
            raise other from None
        reason = without_numbers(first_line(error.__cause__ or error))
    if jax.process_count() > 1:
        text = np.frombuffer(reason.encode()[:REASON_BYTES].ljust(REASON_BYTES), np.uint8)
        told = multihost_utils.process_allgather(text)  # blanks of those without
        reason = max(bytes(row) for row in told).decode(errors="replace").strip()
    if reason:
        raise _Damaged(reason)
    return result


def _kind(dtype, shape) -> str:
    return f"{np.dtype(dtype).name}{list(shape)}"


def _arrays(state) -> dict:
    fingerprints = leaf_fingerprints(state)
    return {
        name: dict(dtype=x.dtype.name, shape=x.shape, fingerprint=fingerprints[name])
        for name, x in named_leaves(state).items()
    }


def _versions() -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return dict(versions=versions, processes=jax.process_count(), devices=jax.device_count())


def _vanished() -> OSError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
