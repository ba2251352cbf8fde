"""The best model of a run by held-out bits per byte: kept beside the newest, and an early stop."""

import contextlib
import math
from pathlib import Path

from bltjax.checkpoints.training_state import Checkpoints
from bltjax.config import TrainingConfig


class Best:
    """Watches what held-out rows take, see `keep_best` and `patience` of TrainingConfig.

    state: {"bits": the fewest bits per byte, None before any; "step": after which; "worse":
    measurements since}, for the position of a checkpoint; None at the start.
    """

    def __init__(
        self, config: TrainingConfig, directory: Path, about: dict | None, state: dict | None
    ):
        self.state = state or dict(bits=None, step=0, worse=0)
        self._patience = config.patience
        self._checkpoints = Checkpoints(directory, 1, 0, about) if config.keep_best else None

    def see(self, step: int, bits: float, params: dict):
        """Counts a measurement after `step` steps, and keeps the parameters of a new best."""
        fewest = math.inf if self.state["bits"] is None else self.state["bits"]
        if bits < fewest:  # NaN is not
            self.state = dict(bits=bits, step=step, worse=0)
            if self._checkpoints:
                self._checkpoints.save(step, dict(params=params), {})
        else:
            self.state = self.state | dict(worse=self.state["worse"] + 1)

    @property
    def is_over(self) -> bool:
        """Returns whether so many measurements in a row were no new best that training ends."""
        return 0 < self._patience <= self.state["worse"]

    def close(self):
        """Waits until the best is on disk. Raises OSError where it could not be written."""
        if self._checkpoints:
            with contextlib.closing(self._checkpoints):
                self._checkpoints.wait()
