"""The working directory of a run: what is in it, and how that is written and read.

config.json       settings; a run that finds others does not touch the directory
patching.json     where patches start, with the calibrated threshold
rows.json         the rows of the BLT, whose budgets may follow from the mean patch
tokenizer.json    tokenizer of the token model
records/          the corpus, unless data.records names another (data/records/store.py)
entropy_model/, blt/, token_model/        the stages that train a model, each with
  checkpoints/    its training state (training_state.py), or instead
  weights/        parameters that were imported (orbax_weights.py)
  metrics.jsonl   what it reports, also in tensorboard/ and profile/
result.json       the measurements of a finished run
error.log         the traceback of the last error
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from bltjax.checkpoints.pytorch.fields import Fields, read_json
from bltjax.checkpoints.weights import WeightsError
from bltjax.config import (
    BLTConfig,
    EntropyModelConfig,
    PatchingConfig,
    RunConfig,
    TokenModelConfig,
    TrainingConfig,
    differences,
    from_config_dict,
    to_dict,
)
from bltjax.patching.boundaries import check_rule
from bltjax.runtime.files import LOCK, alone, write_json

CONFIG, PATCHING, ROWS = "config.json", "patching.json", "rows.json"
CHECKPOINTS, WEIGHTS, METRICS = "checkpoints", "weights", "metrics.jsonl"  # of a stage


def saved_steps(checkpoints: Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, in order; it need not be there."""
    paths = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted(int(path.name) for path in paths if path.name.isdigit())


@dataclasses.dataclass(frozen=True)
class Stage:
    """A model that a run trains, with its settings and its directory."""

    name: str
    model: BLTConfig | EntropyModelConfig | TokenModelConfig
    training: TrainingConfig
    directory: Path

    @property
    def weights(self) -> Path:
        """Directory of imported parameters, which stand for trained ones."""
        return self.directory / WEIGHTS

    def is_finished(self) -> bool:
        """Returns whether there are parameters that training will not change any more."""
        steps = saved_steps(self.directory / CHECKPOINTS)
        return self.weights.is_dir() or self.training.steps in steps

    def params(self) -> dict:
        """Reads the newest parameters onto the mesh that is set.

        Raises FileNotFoundError without any, CheckpointError for damaged ones.
        """
        # Imported late, as below: those who look for files need not wait for JAX.
        from bltjax.checkpoints import orbax_weights, placing, training_state
        from bltjax.model import functional

        abstract = functional.abstract_params(self.model)
        if self.weights.is_dir():
            return placing.put_lazy(orbax_weights.open_weights(self.weights), abstract)
        return training_state.load_params(self.directory / CHECKPOINTS, abstract)

    def lazy_params(self) -> dict:
        """Opens the newest parameters as lazy arrays; needs no devices. Raises as `params`."""
        from bltjax.checkpoints import orbax_weights

        if self.weights.is_dir():
            return orbax_weights.open_weights(self.weights)
        return orbax_weights.open_params(self.directory / CHECKPOINTS)


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The working directory of a run."""

    path: Path

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def error_log(self) -> Path:
        return self.path / "error.log"

    def metrics(self, name: str) -> Path:
        """Returns the file of what a stage reported."""
        return self.path / name / METRICS

    def records(self, config: RunConfig) -> Path:
        """Returns the directory of the corpus."""
        given = os.path.expanduser(config.data.records)
        return Path(given) if given else self.path / "records"

    def stage(self, config: RunConfig, name: str) -> Stage:
        """Returns the stage entropy_model, blt or token_model."""
        return Stage(name, *config.trained(name), self.path / name)

    def is_trained(self, name: str) -> bool:
        """Returns whether a stage has parameters here, trained for however many steps."""
        directory = self.path / name
        return (directory / WEIGHTS).is_dir() or bool(saved_steps(directory / CHECKPOINTS))

    def evaluated(self, stages: Iterable[str] = ()) -> str:
        """Returns which model is evaluated: a BLT if there is one, else a token model.

        Models that `stages` train count as being here. Without either it is the entropy model.
        """
        here = (m for m in ("blt", "token_model") if m in stages or self.is_trained(m))
        return next(here, "entropy_model")

    def claim(self, config: RunConfig):
        """Writes the settings into a new directory, or compares them with those that are there.

        Raises ValueError where they differ, OSError where nothing can be written.
        """
        claim, file = dict(config=to_dict(config)), self.path / CONFIG
        try:
            if self.path.exists() and not file.exists():
                self._refuse_other_files()
            self.path.mkdir(parents=True, exist_ok=True)
            with alone(self.path):  # several processes may begin at once
                if not file.exists():
                    self._refuse_other_files()
                    write_json(file, claim)
                    return
        except OSError as error:
            raise OSError(
                f"--workdir={self.path} cannot be written ({error}): choose another"
            ) from error
        try:
            changed = differences(json.loads(file.read_text())["config"], claim["config"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): restore it, or choose a new --workdir"
            ) from error
        if changed:
            more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                f"{self.path} holds a run of another config ({changed[0]}{more}): choose another "
                "--workdir, or give the settings it was started with"
            )

    def _refuse_other_files(self):
        # Another process may be about to write the claim, or was killed while it wrote it.
        names = {p.name for p in self.path.iterdir()}
        if CONFIG not in names and names - {"config.partial", LOCK}:
            raise ValueError(
                f"{self.path} is not empty and holds no run (no {CONFIG}): choose a new --workdir"
            )

    def config(self) -> RunConfig:
        """Reads the settings. Raises WeightsError where they are missing or wrong."""
        problems: list[str] = []
        claim = read_json(self.path / CONFIG, problems)
        try:
            config = from_config_dict(RunConfig, claim["config"])
            check_rule(config.patching)
            return config
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise WeightsError(self.path, [*problems, f"{CONFIG}: {error}"]) from error

    def threshold(self) -> float | None:
        """Reads the calibrated threshold; None where there is none yet.

        Raises WeightsError where the file is damaged.
        """
        exists = (self.path / PATCHING).exists()
        return self._number(PATCHING, "threshold", float) if exists else None

    def row_bytes(self) -> int:
        """Reads the bytes of a row of the BLT. Raises WeightsError where it is not to be read."""
        return self._number(ROWS, "row_bytes", int)

    def _number(self, name: str, field: str, kind: type):
        problems: list[str] = []
        stored = Fields(name, read_json(self.path / name, problems))
        number = stored.take(field, kind)
        if problems := problems + stored.problems:
            raise WeightsError(self.path, problems)
        return number

    def write_patching(self, patching: PatchingConfig):
        """Writes where patches start, unless that is there: what is trained depends on it."""
        self._write(PATCHING, to_dict(patching), once=True)

    def write_rows(self, rows: dict):
        """Writes the rows of the BLT, at least their `row_bytes`."""
        self._write(ROWS, rows)

    def write_result(self, result: dict):
        """Writes the measurements of a finished run."""
        self._write(self.result.name, result)

    def _write(self, name: str, value: dict, once: bool = False):
        with alone(self.path):  # several processes may write at once
            if not (once and (self.path / name).exists()):
                write_json(self.path / name, value)
