"""The working directory of a run: what is in it, and how that is written and read.

config.json       settings; a run that finds others does not touch the directory
patching.json     where patches start, with the calibrated threshold
start.json        of a run with `start_from`: digests of the parameters that it began with
rows.json         the rows of the BLT, whose budgets may follow from the mean patch
tokenizer.json    tokenizer of the token model
records/          the corpus, unless data.records names another (data/records/store.py)
entropy_model/, blt/, token_model/        the stages that train a model, each with
  checkpoints/    its training state (training_state.py), or instead
  weights/        parameters that were imported (orbax_weights.py)
  best/           with `keep_best`, the parameters with the fewest held-out bits per byte
  metrics.jsonl   what it reports, also in tensorboard/ and profile/
result.json       the measurements of a finished run
error.log         the traceback of the last error
.owner.lock       held by the run that trains here

The directory may be in a bucket (gs://). There a checkpoint is one once STEP.committed lies beside
it, and a stage's metrics, tensorboard/ and profile/ are written on the local disk and sent with
each checkpoint.

What decides how a run goes on has a digest of its own content: config.json, patching.json and
rows.json. Those of earlier versions have none and are taken as they are.
"""

import contextlib
import dataclasses
import re
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
from bltjax.runtime import buckets
from bltjax.runtime.checked_json import read_checked, without_digest, write_checked
from bltjax.runtime.files import LOCK, OWNER, alone, free_name, owning, place_of, write_json
from bltjax.runtime.paths import as_path, is_remote, make_directory
from bltjax.runtime.plain_files import check_utf8
from bltjax.runtime.system_errors import OF_WRITES, UnwritableError, unwritable

CONFIG, PATCHING, ROWS = "config.json", "patching.json", "rows.json"
START = "start.json"
# Of a stage.
CHECKPOINTS, BEST, WEIGHTS, METRICS = "checkpoints", "best", "weights", "metrics.jsonl"
COMMITTED = ".committed"  # in a bucket: beside the directory of a step that is whole
COMMITTED_WEIGHTS = "commit_success.txt"  # which Orbax writes last into what it saves in a bucket
ENDED = "ended"  # in the position of a checkpoint after which training ended early
KEPT_IN = dict(  # where that is which identifies the data of a run
    corpus="the records",
    threshold=PATCHING,
    tokenizer="tokenizer.json",
    teacher="what blt_training.teacher names",
    row_bytes=f"the records and {PATCHING}",
    row_patches=f"the records and {PATCHING}",
)
REMEDIES = {  # for a damaged file of which there is no copy
    CONFIG: "",
    PATCHING: ", or delete it and run bltjax.train again, which finds it anew",
    ROWS: ", or delete it and run bltjax.train again",
    START: ", or delete it",
}
MODELS = ("entropy_model", "blt", "token_model")
LAST_STEP = 2**31 - 1  # steps are counted in int32


def saved_steps(checkpoints: Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, in order; it need not be there.

    What has another name than a step can have is no checkpoint.
    """
    if is_remote(checkpoints):  # one request, however many there are
        objects, folders = buckets.entries(checkpoints)
        names = [name for name in folders if name + COMMITTED in objects]
    else:
        paths = checkpoints.iterdir() if checkpoints.is_dir() else ()
        names = [path.name for path in paths if path.is_dir()]
    steps = sorted(int(name) for name in names if is_step(name))
    return [step for step in steps if step <= LAST_STEP]


def is_step(name: str) -> bool:
    """Returns whether a directory of this name may be the checkpoint of a step."""
    return bool(re.fullmatch(r"0|[1-9][0-9]{0,9}", name))


def has_weights(directory: Path) -> bool:
    """Returns whether there are imported parameters, all of them."""
    if is_remote(directory):
        return buckets.found(directory / COMMITTED_WEIGHTS) is not None
    return directory.is_dir()


def check_identity(position: dict, identity: dict, checkpoints: Path):
    """Raises ValueError where a checkpoint is of other data; earlier ones do not say of which.

    position: that of the checkpoint. identity: values by the names of KEPT_IN.
    """
    for name, here in identity.items():
        trained = position.get(name, here)
        if trained != here:
            raise ValueError(
                f"the checkpoints in {checkpoints} are of the {name} {trained}, and that of the "
                f"run is {here} now: put {KEPT_IN[name]} back, or choose a new --workdir"
            )


@dataclasses.dataclass(frozen=True)
class Stage:
    """A model that a run trains, with its settings and its directory."""

    name: str
    model: BLTConfig | EntropyModelConfig | TokenModelConfig
    training: TrainingConfig
    directory: Path

    @property
    def portable_model(self) -> BLTConfig | EntropyModelConfig | TokenModelConfig:
        """Settings of the model on any devices: attention was chosen for those of the run."""
        return dataclasses.replace(self.model, attention="auto")

    @property
    def weights(self) -> Path:
        """Directory of imported parameters, which stand for trained ones."""
        return self.directory / WEIGHTS

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints of which the newest is the model."""
        best = self.directory / BEST
        is_best = self.training.keep_best and saved_steps(best)
        return best if is_best else self.directory / CHECKPOINTS

    def is_finished(self) -> bool:
        """Returns whether there are parameters that training will not change any more."""
        steps = saved_steps(self.directory / CHECKPOINTS)
        if has_weights(self.weights) or self.training.steps in steps:
            return True
        return self.training.patience > 0 and ENDED in self._position()

    def _position(self) -> dict:
        """Reads the position of the newest checkpoint; {} where it is not to be read."""
        from bltjax.checkpoints import orbax_weights

        checkpoints = self.directory / CHECKPOINTS
        if steps := saved_steps(checkpoints):
            with contextlib.suppress(OSError, ValueError, KeyError):  # who reads it tells of damage
                return orbax_weights.read_record(checkpoints / str(steps[-1]))["position"]
        return {}

    def params(self) -> dict:
        """Reads the newest parameters onto the mesh that is set.

        Raises FileNotFoundError without any, CheckpointError for damaged ones.
        """
        # Imported late, as below: those who look for files need not wait for JAX.
        from bltjax.checkpoints import orbax_weights, placing, training_state
        from bltjax.model import functional

        abstract = functional.abstract_params(self.model)
        if has_weights(self.weights):
            return placing.put_lazy(orbax_weights.open_weights(self.weights), abstract)
        return training_state.load_params(self.checkpoints, abstract)

    def check_data(self, **identity):
        """Raises ValueError where the newest checkpoint is of other data, see `check_identity`."""
        check_identity(self._position(), identity, self.directory / CHECKPOINTS)

    def lazy_params(self) -> dict:
        """Opens the newest parameters as lazy arrays; needs no devices. Raises as `params`."""
        from bltjax.checkpoints import orbax_weights

        if has_weights(self.weights):
            return orbax_weights.open_weights(self.weights)
        return orbax_weights.open_params(self.checkpoints)


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
        given = config.data.records
        return as_path(given) if given else self.path / "records"

    def stage(self, config: RunConfig, name: str) -> Stage:
        """Returns the stage entropy_model, blt or token_model."""
        return Stage(name, *config.trained(name), self.path / name)

    def is_trained(self, name: str) -> bool:
        """Returns whether a stage has parameters here, trained for however many steps."""
        directory = self.path / name
        return has_weights(directory / WEIGHTS) or bool(saved_steps(directory / CHECKPOINTS))

    def evaluated(self, stages: Iterable[str] = ()) -> str:
        """Returns which model is evaluated: a BLT if there is one, else a token model.

        Models that `stages` train count as being here. Without either it is the entropy model.
        """
        here = (m for m in ("blt", "token_model") if m in stages or self.is_trained(m))
        return next(here, "entropy_model")

    def claim(self, config: RunConfig):
        """Writes the settings into a new directory, or compares them with those that are there.

        A directory in which nothing was trained yet takes other settings. Raises ValueError where
        the settings differ, OSError where nothing can be written.
        """
        check_utf8(self.path)
        claim, file = dict(config=to_dict(config)), self.path / CONFIG
        try:
            if self.path.exists() and not file.exists():
                self._refuse_other_files()
            make_directory(self.path)
            with alone(self.path):  # several processes may begin at once
                if not file.exists():
                    self._refuse_other_files()
                    return write_checked(file, claim)
                if not (changed := self._changed(claim)):
                    return
                if self._is_untrained():
                    with contextlib.suppress(BlockingIOError), owning(self.path):
                        return write_checked(file, claim)
        except UnwritableError as error:
            raise OSError(f"{error}, or choose another --workdir") from error
        except OSError as error:
            raise unwritable(self.path, error, ", or choose another --workdir") from error
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ValueError(
            f"{self.path} holds a run of another config ({changed[0]}{more}): choose another "
            "--workdir, or give the settings it was started with"
        )

    def _changed(self, claim: dict) -> list[str]:
        """Returns lines on the settings that are others than those of the directory."""
        file = self.path / CONFIG
        try:
            there = read_checked(file)["config"]
            with contextlib.suppress(ValueError, TypeError):
                # Settings that are newer than the run have their defaults.
                there = to_dict(from_config_dict(RunConfig, there))
            return differences(there, claim["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): put the file back as it was written (settings are "
                "changed in the command, not there), or choose a new --workdir"
            ) from error

    def _is_untrained(self) -> bool:
        made = (self.path / PATCHING).exists() or self.tokenizer.exists()
        return not made and not any(map(self.is_trained, MODELS))

    def _refuse_other_files(self):
        # Another process may be about to write the claim, or was killed while it wrote it.
        names = {p.name for p in self.path.iterdir()}
        if CONFIG not in names and names - {"config.partial", LOCK, OWNER}:
            raise ValueError(
                f"{self.path} is not empty and holds no run (no {CONFIG}): choose a new --workdir"
            )

    @contextlib.contextmanager
    def own(self):
        """Keeps other runs out of the directory until the block ends.

        Raises BlockingIOError, which names the other run, on entering it; UnwritableError where the
        block fails since the disk is full, or since the directory is not the one it was.
        """
        with owning(self.path):
            before = place_of(self.path)
            try:
                yield
            except Exception as error:
                if place_of(self.path) != before:
                    raise UnwritableError(
                        f"{self.path} was moved or deleted while the run wrote into it: put the "
                        f"directory back and run it again{self._set_aside()}"
                    ) from error
                if isinstance(error, OSError) and error.errno in OF_WRITES:
                    raise unwritable(error.filename or self.path, error) from error
                raise

    def _set_aside(self) -> str:
        """Moves what threads wrote in the place of the directory, so that it can be put back."""
        if not self.path.exists() or (self.path / CONFIG).exists():
            return ""
        aside = free_name(self.path.with_name(f"{self.path.name}.remains"))
        with contextlib.suppress(OSError):
            self.path.rename(aside)
        return f"; what was written since is in {aside}"

    def config(self) -> RunConfig:
        """Reads the settings. Raises WeightsError where they are missing or wrong.

        Raises ValueError where the checkpoints beside them cannot be opened by that path.
        """
        check_utf8(self.path)
        try:
            config = from_config_dict(RunConfig, self._read(CONFIG)["config"])
            check_rule(config.patching)
            return config
        except WeightsError:
            raise
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise WeightsError(self.path, [f"{CONFIG}: {error}"]) from error

    def threshold(self) -> float | None:
        """Reads the calibrated threshold; None where there is none yet.

        Raises WeightsError where the file is damaged.
        """
        exists = (self.path / PATCHING).exists()
        return self._number(PATCHING, "threshold", float) if exists else None

    def row_bytes(self) -> int:
        """Reads the bytes of a row of the BLT. Raises WeightsError where it is not to be read."""
        return self._number(ROWS, "row_bytes", int)

    def _read(self, name: str) -> dict:
        problems: list[str] = []
        values = read_json(self.path / name, problems)
        if not problems:
            try:
                return without_digest(values)
            except ValueError as error:
                problems = [f"{name} is damaged ({error})"]
        remedy = f"put it back as it was written{REMEDIES[name]}"
        raise WeightsError(self.path, [f"{problem}: {remedy}" for problem in problems])

    def _number(self, name: str, field: str, kind: type):
        stored = Fields(name, self._read(name))
        number = stored.take(field, kind)
        if stored.problems:
            raise WeightsError(self.path, stored.problems)
        return number

    def write_patching(self, patching: PatchingConfig):
        """Writes where patches start, unless that is there: what is trained depends on it."""
        with alone(self.path):  # several processes may write at once
            if not (self.path / PATCHING).exists():
                write_checked(self.path / PATCHING, to_dict(patching))

    def write_rows(self, rows: dict):
        """Writes the rows of the BLT, at least their `row_bytes`."""
        with alone(self.path):
            write_checked(self.path / ROWS, rows)

    def keep_start(self, model: str, digest: str):
        """Writes the digest of the parameters that a model starts from.

        Raises ValueError where the run has begun with others.
        """
        with alone(self.path):
            kept = self._read(START) if (self.path / START).exists() else {}
            if kept.get(model, digest) != digest:
                raise ValueError(
                    f"{self.path} began with the {model} {kept[model]}, and start_from has "
                    f"{digest} now: put that directory back, or choose a new --workdir"
                )
            write_checked(self.path / START, kept | {model: digest})

    def read_result(self) -> dict | None:
        """Reads the measurements of a finished run; None where there are none, or no JSON."""
        problems: list[str] = []
        result = read_json(self.result, problems)
        return None if problems else result

    def write_result(self, result: dict):
        """Writes the measurements of a finished run."""
        with alone(self.path):
            write_json(self.result, result)
