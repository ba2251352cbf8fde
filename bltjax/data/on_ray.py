"""Prepares a corpus on the machines of a Ray cluster: `bltjax preprocess --ray=ADDRESS`.

A unit of a source is a task, and so is a sum of histograms; Ray runs those again whose process or
machine is gone. Entropies are computed by actors, one a device, which hold the entropy model; a
shard whose actor is gone goes to another. Each piece of work is done under the lock that several
processes on one disk take, so nothing is written twice, and the files are those of one process.
The extra `ray` brings the library, which nothing here imports before `connect`.
"""

import collections
import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bltjax.config.data import DataConfig
from bltjax.data.records import writing
from bltjax.data.records.shards import Shard, score_histogram, without_entropies
from bltjax.data.records.writing import Task
from bltjax.data.sources.libraries import need
from bltjax.patching.calibrate import ScoreHistogram
from bltjax.runtime import object_cache, signals
from bltjax.runtime.paths import as_path
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.system_errors import first_line

ATTEMPTS = 4  # of a task whose process ends, the first included; Ray's own number
SUBMITTED = 1000  # tasks that Ray knows at a time
SUMMED = 64  # shards whose histograms a task sums, and sums that another one does
ANSWER_SECONDS = 10  # in which a cluster must answer
ACCELERATORS = dict(GPU=dict(num_gpus=1), TPU=dict(resources={"TPU": 1}))  # what an actor takes

Histograms = dict[tuple[str, str], ScoreHistogram]  # by source and language


class Setting(NamedTuple):
    """Place and caches of this process, which those of the cluster take over."""

    directory: str  # from which relative paths lead
    copies: object_cache.Settings

    def take(self):
        with contextlib.suppress(OSError):  # paths from the root do without
            os.chdir(self.directory)
        object_cache.use(self.copies)


@contextlib.contextmanager
def connect(address: str) -> Iterator["Cluster"]:
    """Yields the cluster at an address until the block ends.

    address: HOST:PORT; `auto` for the one that runs on this machine; `local` for one of this
    machine's cores that is started and ends with the block. Raises ValueError where Ray is not
    installed or the address is none, OSError where no cluster answers.
    """
    ray = need("ray", "ray")
    _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of a local cluster
    handlers = {number: signal.getsignal(number) for number in signals.DEFAULTS}
    options = dict(include_dashboard=False) if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, RuntimeError) as error:  # the latter of another version
        raise OSError(f"--ray={address}: {first_line(error)}; {_START}") from error
    finally:
        for number, handler in handlers.items():  # Ray has its own, which ends late
            signal.signal(number, handler)
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


_START = "start one with `ray start --head`, or give --ray=local"


def _check_answers(address: str):
    """Raises ValueError or OSError for an address at which Ray would wait for minutes."""
    if address in ("auto", "local"):
        return
    if not (found := re.fullmatch(r"([^\s:/]+):(\d{1,5})", address)):
        raise ValueError(f"--ray={address!r}: give HOST:PORT, auto or local")
    try:
        socket.create_connection((found[1], int(found[2])), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = first_line(error)
        raise OSError(f"--ray={address}: no Ray cluster answers ({reason}): {_START}") from error


class Cluster:
    """The work of `preprocess` on a cluster that this process is connected to."""

    def __init__(self, ray):
        self._ray = ray
        self._setting = Setting(os.getcwd(), object_cache.settings())

    def record_units(
        self,
        directory: Path,
        tasks: Sequence[Task],
        data: DataConfig,
        on_done: Callable[[Task], None],
    ):
        """Records units as `writing.record_units` does. Raises its errors."""
        record = self._task(_record)
        waiting, running = collections.deque(tasks), {}
        while waiting or running:
            while waiting and len(running) < SUBMITTED:
                task = waiting.popleft()
                running[record.remote(self._setting, os.fspath(directory), task, data)] = task
            for done in self._ray.wait(list(running))[0]:
                task = running.pop(done)
                self._result(done, f"part {task.name} of the text")
                on_done(task)

    def add_entropies(self, store, shards: Sequence[Shard], model):
        """Computes the entropies that shards of a Store lack, with a TrainedModel.

        There is always an actor that waits for a device, and as many as those that have one: so
        machines that come later are used, and those that go are replaced.
        """
        missing = without_entropies(store.directory, shards)
        bar = progress_bar("entropies", sum(shard.num_bytes for shard in missing))
        given = self._ray.put(model)
        actor_type = self._ray.remote(**self._device())(_Device)
        waiting = collections.deque(missing)
        running: dict = {}  # (actor, its shard or None while it starts) by what it will return
        deaths = collections.Counter()
        while waiting or any(shard for _, shard in running.values()):
            starting = sum(shard is None for _, shard in running.values())
            while starting < min(len(waiting), 1 + len(running) - starting):
                actor = actor_type.remote(self._setting, given)
                running[actor.start.remote()] = actor, None
                starting += 1
            for done in self._ray.wait(list(running))[0]:
                actor, shard = running.pop(done)
                what = f"the entropies of {shard.path}" if shard else "the entropy model"
                try:
                    self._result(done, what)
                except self._ray.exceptions.RayActorError as error:
                    deaths[what] += 1
                    if deaths[what] == ATTEMPTS:
                        raise _lost(what, error) from error
                    waiting.extendleft([shard] if shard else [])
                    continue
                deaths[what] = 0
                bar.update(shard.num_bytes if shard else 0)
                if waiting:
                    shard = waiting.popleft()
                    running[actor.add.remote(_light(store), shard)] = actor, shard
        bar.close()

    def score_histogram(self, shards: Sequence[Shard]) -> Histograms:
        """Returns what `shards.score_histogram` does. Raises its errors."""
        count, join = self._task(_count), self._task(_join)
        parts = [count.remote(self._setting, part) for part in _cut(shards)] or [join.remote()]
        while len(parts) > 1:
            parts = [join.remote(*part) for part in _cut(parts)]
        return self._result(parts[0], "a sum of histograms")

    def _task(self, function: Callable):
        return self._ray.remote(max_retries=ATTEMPTS - 1, num_cpus=1)(function)

    def _result(self, reference, what: str):
        """Returns what a task returned; raises the error that it raised, or OSError."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayError as error:
            cause = getattr(error, "cause", None)  # of a task
            if isinstance(cause, ValueError | OSError):
                raise cause from None
            if missing := _MISSING.search(str(error)):
                raise _not_installed(missing[1]) from error
            if isinstance(error, exceptions.RayTaskError | exceptions.RayActorError):
                raise
            raise _lost(what, error) from error

    def _device(self) -> dict:
        """Returns what an actor takes of a machine: an accelerator if there are any, or a core."""
        there = self._ray.cluster_resources()
        return next((a for name, a in ACCELERATORS.items() if there.get(name)), dict(num_cpus=1))


class _Device:
    """An actor: an entropy model on the device that Ray gives to its process."""

    def __init__(self, setting: Setting, model):
        self._setting, self._model = setting, model

    def start(self):
        from bltjax.data.records.entropies import Computer  # late: other tasks need no JAX

        self._setting.take()
        self._computer = Computer(self._model)

    def add(self, store, shard: Shard):
        self._computer.add(store._replace(directory=as_path(store.directory)), [shard])


def _record(setting: Setting, directory: str, task: Task, data: DataConfig):
    setting.take()
    writing.record_units(as_path(directory), [task], data)


def _count(setting: Setting, shards: Sequence[Shard]) -> Histograms:
    setting.take()
    return score_histogram(shards)


def _join(*parts: Histograms) -> Histograms:
    total: Histograms = collections.defaultdict(ScoreHistogram)
    for part in parts:
        for key, histogram in part.items():
            total[key].merge(histogram)
    return dict(total)


def _cut(items: Sequence) -> list[Sequence]:
    return [items[i : i + SUMMED] for i in range(0, len(items), SUMMED)]


def _light(store):
    """Returns a Store as small as an actor needs it."""
    return store._replace(directory=os.fspath(store.directory), all_shards=[], bad={})


_MISSING = re.compile(r"\bNo module named '([^']+)'")


def _not_installed(module: str) -> OSError:
    return OSError(
        f"{module} is not installed on a machine of the Ray cluster: run pip install 'bltjax[ray]' "
        "on each, with this version, or submit the command with `ray job submit --runtime-env-json`"
    )


def _lost(what: str, error: Exception) -> OSError:
    return OSError(
        f"{what}: a process of the Ray cluster ended {ATTEMPTS} times while it worked on that "
        f"({first_line(error)}): see to the cluster, and run it again"
    )
