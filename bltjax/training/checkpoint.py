"""Checkpoints: the training state and the data position, saved together; the only Orbax import.

A checkpoint appears under its step number only when it is whole: a process killed while it
writes leaves a temporary directory, which the next run removes.
"""

import contextlib
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import FixedIntervalPolicy, LatestN

from bltjax import sharding


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names it and the remedy."""


def first_line(error: Exception) -> str:
    """What an error says, without the pages that follow it."""
    line = str(error).strip().split("\n")[0] or repr(error)
    return line if len(line) <= 200 else f"{line[:100]}...{line[-100:]}"  # causes come last


class Checkpoints:
    """The checkpoints of one training stage, newest `keep` of those at every `every` steps."""

    def __init__(self, directory: Path, every: int = 1, keep: int = 1):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs dozens of lines a save
        self.directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=FixedIntervalPolicy(every),
                preservation_policy=LatestN(keep),
                cleanup_tmp_directories=True,
            ),
        )

    def is_due(self, step: int) -> bool:
        return self._manager.should_save(step)

    def save(self, step: int, state, data_position: dict, force: bool = False):
        """Start saving in the background; an error shows in the next call or in `close`."""
        self._manager.save(
            step,
            force=force,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position)
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        return list(self._manager.all_steps())

    def restore(self, abstract_state):
        """The newest (state, data position), sharded as `abstract_state` says; None without one.

        Raises CheckpointError for a damaged checkpoint or one of another model.
        """
        step = self.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(sharding.concrete(abstract_state)),
            data=ocp.args.JsonRestore(),
        )
        try:
            with _stderr_unless_failed():
                restored = self._manager.restore(step, args=args)
        except Exception as error:  # Orbax raises bare Exceptions for damaged files
            older = [s for s in self.all_steps() if s < step]
            remedy = f"to resume from step {max(older)}" if older else "to start this stage anew"
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read "
                f"({first_line(error)}); delete that directory {remedy}"
            ) from error
        return restored["state"], restored["data"]

    def wait(self):
        """Until the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self):
        self._manager.close()


@contextlib.contextmanager
def _stderr_unless_failed():
    """Hold stderr back and show it at the end, unless the block fails.

    After a first failed read Orbax closes its event loop under the other reads, and each of them
    prints a traceback from a thread of its own; the exception that is raised says it all.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            if failed:
                time.sleep(0.5)  # for the reads under way
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            if not failed:
                held.seek(0)
                os.write(2, held.read())


def load_params(directory: Path, abstract_state) -> dict:
    """The parameters in the newest checkpoint of a stage.

    Raises FileNotFoundError if there is none, CheckpointError if it is damaged.
    """
    if not has_checkpoint(directory):
        raise FileNotFoundError(f"no checkpoint in {directory}: train that stage first")
    checkpoints = Checkpoints(directory)
    try:
        restored = checkpoints.restore(abstract_state)
    finally:
        checkpoints.close()
    return restored[0].params


def has_checkpoint(directory: Path) -> bool:
    """Whether a stage has saved anything there; nothing is created."""
    return directory.is_dir() and any(path.name.isdigit() for path in directory.iterdir())
