"""Runs that end in the middle."""

import contextlib

import pytest

from bltjax.checkpoints.run_directory import CHECKPOINTS
from bltjax.training import loop


@contextlib.contextmanager
def interrupted_at(step: int):
    """Ends the block with an error, which it expects, once the checkpoint of a step is saved."""
    real = loop.Checkpoints.save

    def save(self, saved, *rest):
        real(self, saved, *rest)
        if saved == step and self.directory.name == CHECKPOINTS:  # and not among the best
            self.wait()
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", save)
        with pytest.raises(InterruptedError):
            yield
