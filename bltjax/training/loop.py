"""The training loop of one stage: resume, step, log, save."""

import copy
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bltjax import sharding
from bltjax.config import TrainingConfig
from bltjax.data.lanes import Layout
from bltjax.data.pipeline import as_batch, batches
from bltjax.training.checkpoint import Checkpoints
from bltjax.training.metrics import MetricsLog, SourceMeter
from bltjax.training.optimizer import learning_rate, make_optimizer
from bltjax.training.state import abstract_state, create_state
from bltjax.training.step import make_train_step


class TrainingData(NamedTuple):
    """What a stage reads: documents in their order (`data.mixture`), and rows made of them."""

    documents: Any  # places -> (source number, document)
    layout: Layout
    sources: tuple[str, ...] = ("text",)
    workers: int = 0


class InStep(NamedTuple):
    """For rows without patches: `in_step.make_patch_finder` and the entropy model's parameters."""

    find_patches: Any
    entropy_params: dict | None


class NonFiniteLoss(FloatingPointError):
    """Training diverged; the message names the step and the last good checkpoint."""


class TrainResult(NamedTuple):
    params: dict
    compilations: int  # of the training step in this process; 0 if there was nothing left to do
    data_wait_fraction: float | None = None  # of the time of the steps, in which no batch was ready


def train(
    stage: str,
    model_config,
    config: TrainingConfig,
    data: TrainingData,
    workdir: Path,
    in_step: InStep | None = None,
) -> TrainResult:
    """Train a model on packed rows, resuming from the newest checkpoint in `workdir`/checkpoints.

    Stopped at any moment and called again it ends with the same parameters and metrics, bit for
    bit, with any number of workers. Raises NonFiniteLoss, CheckpointError.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(config.optimizer, config.steps)
    checkpoints = Checkpoints(
        workdir / "checkpoints", config.checkpoint_every, config.keep_checkpoints
    )
    restored = checkpoints.restore(abstract_state(model_config, optimizer))
    if restored is None:
        state, position = create_state(model_config, optimizer, config.seed), {}
    else:
        state, position = restored
    first_step = int(state.step)
    if first_step:
        print(f"{stage}: resumed at step {first_step} of {config.steps}", flush=True)
    if first_step >= config.steps:
        checkpoints.close()
        return TrainResult(state.params, compilations=0)

    step_fn = make_train_step(
        model_config,
        optimizer,
        lambda step: learning_rate(config.optimizer, step, config.steps),
        in_step and in_step.find_patches,
        len(data.sources),
    )
    frozen = [in_step.entropy_params] if in_step else []
    log = MetricsLog(workdir, stage, first_step, config.steps)
    sources = SourceMeter(data.sources, position.get("sources"))
    pending = []  # (step, metrics still on the device), so that the host never waits for a step

    def drain():
        for step, metrics in pending:
            metrics = jax.device_get(metrics)
            if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
                _stop(stage, step, metrics, checkpoints)
            log.count(metrics["bytes"])
            sources.count(metrics.pop("source_nats"), metrics.pop("source_bytes"))
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                log.write(step, metrics | sources.values())
        pending.clear()

    rows = sharding.rows_of_process(config.batch_size)
    states = np.array(position["lanes"])[rows] if position else None
    stream = batches(data.documents, data.layout, config.batch_size, states, rows, data.workers)
    try:
        for step in range(first_step, config.steps):
            asked = time.perf_counter()
            batch, states = next(stream)
            log.waited(time.perf_counter() - asked)
            batch = sharding.put_batch(as_batch(batch, sources=True))
            state, metrics = step_fn(state, batch, *frozen)
            pending.append((step, metrics))
            last = step + 1 == config.steps
            if len(pending) > config.log_every or last or checkpoints.is_due(step + 1):
                drain()
            if last or checkpoints.is_due(step + 1):
                lanes = sharding.gather_rows(states).tolist()
                position = dict(lanes=lanes, sources=copy.deepcopy(sources.state))
                checkpoints.save(step + 1, state, position, force=last)
        checkpoints.wait()
    finally:
        stream.close()
        log.close()
        checkpoints.close()
    return TrainResult(state.params, step_fn._cache_size(), log.data_wait_fraction)


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
