"""The training loop of one stage: resume, step, log, save."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bltjax import sharding
from bltjax.config import TrainingConfig
from bltjax.data.packing import Row
from bltjax.data.pipeline import batches
from bltjax.training.checkpoint import Checkpoints
from bltjax.training.metrics import MetricsLog
from bltjax.training.optimizer import learning_rate, make_optimizer
from bltjax.training.state import abstract_state, create_state
from bltjax.training.step import make_train_step


class NonFiniteLoss(FloatingPointError):
    """Training diverged; the message names the step and the last good checkpoint."""


class TrainResult(NamedTuple):
    params: dict
    compilations: int  # of the training step in this process; 0 if there was nothing left to do


def train(
    stage: str,
    model_config,
    config: TrainingConfig,
    rows: Row,
    workdir: Path,
) -> TrainResult:
    """Train a model on packed rows, resuming from the newest checkpoint in `workdir`/checkpoints.

    Stopped at any moment and called again it ends with the same parameters and metrics, bit for
    bit. Raises NonFiniteLoss, CheckpointError.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(config.optimizer, config.steps)
    data = batches(rows, config.batch_size, config.seed)
    checkpoints = Checkpoints(
        workdir / "checkpoints", config.checkpoint_every, config.keep_checkpoints
    )
    restored = checkpoints.restore(abstract_state(model_config, optimizer))
    if restored is None:
        state = create_state(model_config, optimizer, config.seed)
    else:
        state, position = restored
        data.set_state(position)
    first_step = int(state.step)
    if first_step:
        print(f"{stage}: resumed at step {first_step} of {config.steps}", flush=True)
    if first_step >= config.steps:
        checkpoints.close()
        return TrainResult(state.params, compilations=0)

    step_fn = make_train_step(
        model_config, optimizer, lambda step: learning_rate(config.optimizer, step, config.steps)
    )
    log = MetricsLog(workdir, stage, first_step, config.steps)
    pending = []  # (step, metrics still on the device), so that the host never waits for a step

    def drain():
        for step, metrics in pending:
            metrics = jax.device_get(metrics)
            if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
                _stop(stage, step, metrics, checkpoints)
            log.count(metrics["bytes"])
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                log.write(step, metrics)
        pending.clear()

    try:
        for step in range(first_step, config.steps):
            state, metrics = step_fn(state, sharding.put_batch(next(data)))
            pending.append((step, metrics))
            last = step + 1 == config.steps
            if len(pending) > config.log_every or last or checkpoints.is_due(step + 1):
                drain()
            if last or checkpoints.is_due(step + 1):
                checkpoints.save(step + 1, state, data.get_state(), force=last)
        checkpoints.wait()
    finally:
        log.close()
        checkpoints.close()
    return TrainResult(state.params, step_fn._cache_size())


def _stop(stage, step, metrics, checkpoints):
    """The checkpoint of `step` itself holds what gave this loss: the last good one is older."""
    checkpoints.wait()
    older = [saved for saved in checkpoints.all_steps() if saved < step]
    kept = (
        f"the last good checkpoint is {checkpoints.directory / str(max(older))}"
        if older
        else "no checkpoint from before it was kept"
    )
    raise NonFiniteLoss(
        f"{stage}: loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at step {step}; "
        f"{kept}; lower the learning rate or raise warmup_steps, in a new --workdir"
    )
