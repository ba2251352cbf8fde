"""The parameters that a stage of a run left, or that were put in its place."""

from collections.abc import Iterable
from pathlib import Path

from bltjax.checkpoints import placing
from bltjax.checkpoints.orbax_weights import open_params, open_weights, saved_steps
from bltjax.checkpoints.training_state import load_params
from bltjax.config import RunConfig, TrainingConfig
from bltjax.model import functional

WEIGHTS = "weights"  # in a stage's directory: parameters that were brought, not trained


def entropy_params(config: RunConfig, workdir: Path) -> dict:
    return trained_params(config.entropy_model, workdir / "entropy_model")


def blt_params(config: RunConfig, workdir: Path) -> dict:
    return trained_params(config.blt, workdir / "blt")


def token_params(config: RunConfig, workdir: Path) -> dict:
    return trained_params(config.token_model, workdir / "token_model")


def trained_params(model_config, directory: Path) -> dict:
    """On the mesh that is set. Raises FileNotFoundError without any, CheckpointError if damaged."""
    abstract = functional.abstract_params(model_config)
    if (directory / WEIGHTS).is_dir():
        return placing.put_lazy(open_weights(directory / WEIGHTS), abstract)
    return load_params(directory / "checkpoints", abstract)


def open_trained(directory: Path) -> dict:
    """The parameters in a stage's directory as lazy arrays; needs no devices."""
    if (directory / WEIGHTS).is_dir():
        return open_weights(directory / WEIGHTS)
    return open_params(directory / "checkpoints")


def is_trained(directory: Path) -> bool:
    """Whether a stage's directory holds parameters, of however many steps."""
    return (directory / WEIGHTS).is_dir() or bool(saved_steps(directory / "checkpoints"))


def is_of_tokens(stages: Iterable[str], workdir: Path) -> bool:
    """Whether the token model is what stages in a working directory evaluate: with no BLT there."""
    here = [m for m in ("blt", "token_model") if m in stages or is_trained(workdir / m)]
    return here == ["token_model"]


def is_finished(stage: TrainingConfig, directory: Path) -> bool:
    """Whether a stage's directory holds parameters that further training will not change."""
    last = directory / "checkpoints" / str(stage.steps)
    return (directory / WEIGHTS).is_dir() or last.is_dir()
