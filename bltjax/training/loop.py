"""The training loop of one stage: resume, step, log, save, stop when asked."""

import collections
import contextlib
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bltjax import sharding
from bltjax.checkpoints.run_directory import BEST, CHECKPOINTS, ENDED, METRICS, check_identity
from bltjax.checkpoints.training_state import Checkpoints
from bltjax.config import ProfileConfig, TrainingConfig
from bltjax.data.batches.lanes import Layout
from bltjax.data.batches.loader import as_batch, batches
from bltjax.runtime import heap
from bltjax.runtime.paths import make_directory
from bltjax.runtime.progress import announced
from bltjax.runtime.scratch import scratch_of
from bltjax.runtime.signals import Stopped, noticing
from bltjax.training.best import Best
from bltjax.training.metrics import HELD_OUT, MetricsLog, SourceMeter, StepMeans
from bltjax.training.optimizer import make_optimizer
from bltjax.training.profiling import Profiler, memory
from bltjax.training.sparse_hash_updates import current_params, finish_missed_updates
from bltjax.training.state import abstract_state, create_state, start_state
from bltjax.training.step import make_train_step
from bltjax.training.teacher import Teacher

IN_FLIGHT = 2  # steps that the devices have been given whose metrics the host has not read
MAX_SKIPPED = 20  # skipped updates in a row before the run counts as lost


class TrainingData(NamedTuple):
    """Documents in their order (`data.batches.order`), and the layout of the rows made of them.

    identity: JSON values that tell the data apart, by the names of
    `run_directory.KEPT_IN`. The position holds them, and a run that goes on with others is refused.
    """

    documents: Any  # places -> (source number, document)
    layout: Layout
    sources: tuple[str, ...] = ("text",)
    workers: int = 0
    identity: dict = {}  # noqa: RUF012


class InStep(NamedTuple):
    """Finder of patches for rows without them, see `make_patch_finder`, and its parameters."""

    find_patches: Any
    entropy_params: dict | None


class Reporting(NamedTuple):
    """Settings of metrics, profiles and checkpoints that do not change the training."""

    flops_per_byte: float | None = None  # of training; both give the model-FLOP utilisation
    peak_flops: float | None = None  # FLOP/s of the mesh
    profile: ProfileConfig | None = None
    metadata: dict | None = None  # stored in each checkpoint: the resolved config
    held_out: Callable[[dict], dict] | None = None  # params -> values of a line, see validate_every


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
    reporting: Reporting = Reporting(),
    first_params: Callable[[], dict] | None = None,
    teacher: Teacher | None = None,
) -> TrainResult:
    """Trains a model on packed rows, resuming from the newest good checkpoint in `workdir`.

    Killed at any moment and called again, it ends with the same parameters and metrics, bit for
    bit, with any number of workers. SIGTERM or Ctrl-C to any process makes all of them save the
    same step and raise Stopped. first_params: reads the parameters of a new run, which are saved
    before its first step; None draws them. teacher: that rows have the tokens of. Raises
    NonFiniteLoss, CheckpointError, OSError where nothing can be saved, and ValueError for other
    data than that of the checkpoint.
    """
    make_directory(workdir)
    heap.keep_between_steps()
    tokenizer = data.layout.tokenizer
    byte_lengths = tokenizer and tokenizer.byte_lengths(model_config.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.steps)
    checkpoints = Checkpoints(
        workdir / CHECKPOINTS, config.keep_checkpoints, config.keep_every, reporting.metadata
    )
    with contextlib.closing(checkpoints):
        state, position = _start(
            stage, model_config, config, optimizer, checkpoints, first_params, data.identity
        )
        check_identity(position, data.identity, checkpoints.directory)
        first_step = int(state.step)
        if first_step >= config.steps or position.get(ENDED):
            return TrainResult(state.params, compilations=0)
        find_patches = in_step and in_step.find_patches
        of_batches = find_patches, len(data.sources), byte_lengths, teacher and teacher.row_tokens
        step_fn = make_train_step(model_config, config, optimizer, *of_batches)
        held_out = reporting.held_out if config.validate_every else None
        best = Best(config, workdir / BEST, reporting.metadata, position.get("best"))
        with scratch_of(workdir, METRICS) as scratch, contextlib.closing(best):
            flops = reporting.flops_per_byte, reporting.peak_flops
            log = MetricsLog(scratch.path, stage, first_step, config.steps, *flops)
            profiler = Profiler(
                reporting.profile, stage, scratch.path / "profile", workdir / "profile"
            )
            named = stage, config, data, checkpoints, log, profiler
            run = _Run(*named, position, first_step, held_out, best, scratch.publish)
            with contextlib.closing(run):
                if first_step == 0 and first_params is not None:
                    run.measure_start(state)
                frozen = [in_step and in_step.entropy_params, teacher and teacher.arrays]
                state = run.steps(step_fn, state, frozen)
        return TrainResult(state.params, step_fn._cache_size(), log.data_wait_fraction)


def _start(
    stage, model_config, config, optimizer, checkpoints: Checkpoints, first_params, identity: dict
):
    """Returns the newest good checkpoint's state and data position, or those of a new run."""
    restored = checkpoints.restore(abstract_state(model_config, optimizer))
    if restored is None and first_params is not None:
        state = start_state(first_params(), optimizer)
        checkpoints.save(0, state, identity)
        return state, {}
    if restored is None:
        with announced(f"{stage}: compiling the initialisation"):
            return create_state(model_config, optimizer, config.seed), {}
    print(f"{stage}: resumed at step {restored.step} of {config.steps}", flush=True)
    return restored.state, restored.position


class _Run:
    """Steps of a stage from `first_step` on, with their log and checkpoints."""

    def __init__(
        self,
        stage,
        config,
        data,
        checkpoints,
        log,
        profiler,
        position,
        first_step,
        held_out,
        best,
        publish,
    ):
        self.publish = publish
        self.stage, self.config, self.checkpoints = stage, config, checkpoints
        self.held_out, self.measured, self.best = held_out, False, best
        self.log, self.profiler, self.first_step = log, profiler, first_step
        self.sources = SourceMeter(data.sources, position.get("sources"))
        self.means = StepMeans(position.get("means"))
        self.identity = data.identity
        rows = sharding.rows_of_process(config.batch_size)
        states = np.array(position["lanes"])[rows] if "lanes" in position else None
        self.stream = batches(
            data.documents, data.layout, config.batch_size, states, rows, data.workers
        )
        # (step, metrics on the device, held-out values) of steps in flight: the host never waits
        # for the newest metrics.
        self.pending = collections.deque()

    def steps(self, step_fn, state, frozen):
        """Trains up to the last step; returns the state, or raises Stopped."""
        with noticing() as notice:
            for step in range(self.first_step, self.config.steps):
                batch, lanes = self.next_batch(notice.received is not None)
                with self.profiler.step(step, state.step), self.compiling(step):
                    state, metrics = step_fn(state, batch, *frozen)
                done = step + 1
                self.pending.append((step, metrics, self.measure(done, state)))
                last = done == self.config.steps or self.best.is_over
                due = last or done % self.config.checkpoint_every == 0
                # A stop of any process comes with the metrics, so all see it in the same step.
                stop = self.drain(step_fn, 0 if due else IN_FLIGHT)
                if stop and not due:
                    self.drain(step_fn, 0)
                if last and self.config.optimizer.hash_updates == "touched":
                    state = finish_missed_updates(self.config, state)
                if due or stop:
                    self.save(done, state, lanes, last)
                if stop or last:
                    break
            self.checkpoints.wait()
            sharding.barrier("the stage is saved")
        if stop or notice.received is not None:  # perhaps after the last step
            raise Stopped(
                f"{self.stage}: stopped as asked, step {done} of {self.config.steps} is saved: run "
                "the same command again"
            )
        if self.best.is_over:
            print(
                f"{self.stage}: ended after {done} of {self.config.steps} steps, as "
                f"{self.config.patience} measurements in a row were no better than that after "
                f"{self.best.state['step']}",
                flush=True,
            )
        return state

    def compiling(self, step: int):
        """Returns the context to run a step in; that of the first tells that it compiles."""
        return self._first_step() if step == self.first_step else contextlib.nullcontext()

    @contextlib.contextmanager
    def _first_step(self):
        with announced(f"{self.stage}: compiling the training step"):
            yield
        self.log.restart(self.first_step)

    def measure(self, done: int, state) -> dict:
        """Returns what the model makes of held-out rows, after steps where that is due; or {}."""
        every = self.config.validate_every
        if self.held_out is None or (done % every and done != self.config.steps):
            return {}
        params = current_params(self.config, state)
        found = self._measured(params)
        self.best.see(done, found[HELD_OUT], params)
        return found

    def measure_start(self, state):
        """Prints what held-out rows take before the first step, of given parameters."""
        if self.held_out is not None:
            params = current_params(self.config, state)
            found = self._measured(params)[HELD_OUT]
            self.best.see(0, found, params)
            print(f"{self.stage}: held out {found:.3f} before the first step", flush=True)

    def _measured(self, params: dict) -> dict:
        told = contextlib.nullcontext()
        if not self.measured:
            told, self.measured = announced(f"{self.stage}: compiling the held-out step"), True
        with self.log.paused(), told:
            return self.held_out(params)

    def next_batch(self, stop: bool):
        """Returns the next batch, on the devices, and the lanes' state after it."""
        asked = time.perf_counter()
        rows, lanes = next(self.stream)
        self.log.waited(time.perf_counter() - asked)
        batch = as_batch(rows, sources=True)
        batch["stop"] = np.full(len(lanes), stop, np.int32)
        return sharding.put_batch(batch), lanes

    def drain(self, step_fn, in_flight: int) -> bool:
        """Reads the metrics of all but the newest steps; True where a process was told to stop."""
        stop = False
        while len(self.pending) > in_flight:
            step, metrics, held_out = self.pending.popleft()
            metrics = jax.device_get(metrics)
            stop |= bool(metrics.pop("stop"))
            self.check(step, metrics)
            self.log.count(metrics["bytes"])
            self.means.count({k: v for k, v in metrics.items() if not k.startswith("source_")})
            by_source = metrics.pop("source_nats"), metrics.pop("source_bytes")
            if not metrics.get("skipped_in_a_row"):  # else it may be NaN
                self.sources.count(*by_source)
            due = (step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps
            if due or held_out:
                values = self.means.values() | self.sources.values() | held_out
                compiled = dict(compilations=step_fn._cache_size())
                self.log.write(step, values | compiled | memory())
        return stop

    def check(self, step: int, metrics: dict):
        """Raises NonFiniteLoss where the loss is not finite, or too many updates were skipped."""
        if "skipped" in metrics:
            lost = metrics["skipped_in_a_row"] >= MAX_SKIPPED
            why = f"{MAX_SKIPPED} updates in a row were left out, "
        else:
            lost = not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
            why = ""
        if not lost:
            return
        # The checkpoint at the first bad step holds the parameters that gave its loss.
        self.checkpoints.wait()
        first_bad = step - max(int(metrics.get("skipped_in_a_row", 1)) - 1, 0)
        older = [saved for saved in self.checkpoints.all_steps() if saved < first_bad]
        kept = "no checkpoint from before it was kept"
        if older:
            kept = f"the last good checkpoint is {self.checkpoints.directory / str(max(older))}"
        raise NonFiniteLoss(
            f"{self.stage}: {why}loss {metrics['loss']} and gradient norm {metrics['grad_norm']} "
            f"at step {step}; {kept}; lower the learning rate or raise warmup_steps, in a new "
            "--workdir"
        )

    def save(self, step: int, state, lanes: np.ndarray, last: bool):
        lanes = sharding.gather_rows(lanes).tolist()
        meters = dict(sources=self.sources.state, means=self.means.state)
        of_best = {} if self.held_out is None else dict(best=self.best.state)
        position = dict(lanes=lanes, **copy.deepcopy(meters)) | self.identity | of_best
        if last and step < self.config.steps:
            position[ENDED] = True
        self.publish()
        self.checkpoints.save(step, state, position)

    def close(self):
        with contextlib.closing(self.stream):
            self.profiler.close()
