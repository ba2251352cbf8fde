"""The one thread that owns the device, and how handlers of requests talk with it.

Handlers run in an event loop and never touch the model: they put commands into a queue, and pieces
come back as callbacks of the loop. Methods say on which side they run.
"""

import asyncio
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from bltjax.inference.jobs import Job
from bltjax.inference.scheduler import Scheduler
from bltjax.serving.errors import RequestError
from bltjax.serving.metrics import Metrics

RETRY_SECONDS = 1
SCORED_AT_ONCE = 2**15  # bytes of texts, of as many requests as wait
ALL = object()  # has been warmed up


class Scoring(NamedTuple):
    """Texts whose log-probabilities a request waits for."""

    texts: list[bytes]
    answer: asyncio.Future


class Worker:
    """Runs the jobs of all requests, texts to score, and other calls, in one thread.

    score: from texts to their log-probabilities, float32 [bytes + 1, num_ids] each. max_open: jobs
    and texts at once, running or waiting. warm_up: what is done, step by step, while no request is
    there.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        score: Callable[[list[bytes]], list[np.ndarray]],
        mesh: jax.sharding.Mesh,
        metrics: Metrics,
        max_open: int,
        warm_up: Iterator | None = None,
    ):
        self._scheduler, self._score, self._mesh = scheduler, score, mesh
        self._warm_up, self.is_warm = warm_up, warm_up is None
        self._metrics, self._max_open = metrics, max_open
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        # Of the loop:
        self.failure: BaseException | None = None
        self._num_open = 0
        self._answers: set[Answer] = set()
        self._futures: set[asyncio.Future] = set()
        # Of the thread:
        self._owners: dict[int, tuple[Answer, int]] = {}
        self._scorings: list[Scoring] = []

    # ---- in the event loop

    def start(self, on_death: Callable[[], None]):
        """Starts the thread; pieces go to the loop that runs now.

        on_death: called in the loop where the thread fails.
        """
        self._loop, self._on_death = asyncio.get_running_loop(), on_death
        self._thread.start()

    def stop(self):
        """Ends the thread when what it is doing is done."""
        self._commands.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> "Answer":
        """Returns the answer of several jobs. Raises RequestError where too many wait."""
        self._admit(len(jobs))
        answer = Answer(self, len(jobs))
        self._answers.add(answer)
        self._commands.put(lambda: self._submit(answer, jobs))
        return answer

    async def log_probs(self, texts: list[bytes]) -> list[np.ndarray]:
        """Returns float32 [bytes + 1, num_ids] of each text. Raises RequestError."""
        self._admit(len(texts))
        try:
            return await self._asked(lambda answer: self._commands.put(Scoring(texts, answer)))
        finally:
            self._num_open -= len(texts)

    async def call(self, function: Callable):
        """Returns what a function gives in the thread. Raises RequestError."""
        self._admit(1)
        try:
            return await self._asked(
                lambda answer: self._commands.put(lambda: self._call(function, answer))
            )
        finally:
            self._num_open -= 1

    async def _asked(self, ask: Callable[[asyncio.Future], None]):
        answer = self._loop.create_future()
        self._futures.add(answer)
        try:
            ask(answer)
            return await answer
        except ValueError as error:
            raise RequestError(str(error)) from None
        finally:
            self._futures.discard(answer)

    def _admit(self, count: int):
        self.check()
        if count > self._max_open:
            raise RequestError(
                f"{count} texts are asked for at once, and there is room for {self._max_open}: "
                "send fewer prompts, or a smaller n"
            )
        if self._num_open + count > self._max_open:
            raise RequestError(
                f"{self._num_open} texts are being written or wait: try again later",
                status=429,
                code="queue_full",
                retry_after=RETRY_SECONDS,
            )
        self._num_open += count

    def check(self):
        """Raises RequestError where the thread has failed."""
        if self.failure is not None:
            raise broken()

    def close(self, answer: "Answer"):
        """Cancels the jobs of an answer that are not finished."""
        if answer in self._answers:
            self._answers.remove(answer)
            self._num_open -= answer.num_jobs
            self._commands.put(lambda: self._cancel(answer))

    def _fail(self, error: BaseException):
        self.failure = error
        for answer in self._answers:
            answer.pieces.put_nowait((0, broken()))
        for future in self._futures:
            _resolve(future, error=broken())
        self._on_death()

    # ---- in the thread

    def _run(self):
        try:
            with jax.set_mesh(self._mesh):
                while self._take_commands():
                    self._score_some()
                    if not self._scheduler.idle:
                        self._step()
                    elif not self.is_warm:
                        self.is_warm = next(self._warm_up, ALL) is ALL
        except BaseException as error:
            traceback.print_exception(error)
            self._in_loop(self._fail, error)

    def _take_commands(self) -> bool:
        """Does what handlers ask for; waits where there is nothing else to do. False: to end."""
        while True:
            is_busy = self._scorings or not self._scheduler.idle or not self.is_warm
            try:
                command = self._commands.get(block=not is_busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, Scoring):
                self._scorings.append(command)
            else:
                command()

    def _step(self):
        pieces = self._scheduler.step()
        for piece in pieces:
            if piece.key in self._owners:
                answer, number = self._owners[piece.key]
                self._in_loop(answer.pieces.put_nowait, (number, piece))
                if piece.finish is not None:
                    del self._owners[piece.key]
        num_finished = sum(piece.finish is not None for piece in pieces)
        self._metrics.stepped(self._scheduler.stats, num_finished)

    def _submit(self, answer: "Answer", jobs: Sequence[Job]):
        keys = []
        try:
            for number, job in enumerate(jobs):
                keys.append(self._scheduler.submit(job))
                self._owners[keys[-1]] = answer, number
        except ValueError as error:  # what there is no room for
            for key in keys:
                self._scheduler.cancel(key)
                del self._owners[key]
            self._in_loop(answer.pieces.put_nowait, (0, RequestError(str(error))))

    def _cancel(self, answer: "Answer"):
        for key in [key for key, (owner, _) in self._owners.items() if owner is answer]:
            del self._owners[key]
            self._scheduler.cancel(key)
        self._metrics.show(self._scheduler.stats)

    def _score_some(self):
        """Scores the texts of several requests together; those whose clients left are skipped."""
        texts, chosen = [], []
        while self._scorings and sum(map(len, texts)) < SCORED_AT_ONCE:
            scoring = self._scorings.pop(0)
            if not scoring.answer.done():
                chosen.append(scoring)
                texts += scoring.texts
        found = iter(self._score(texts) if texts else [])
        for scoring in chosen:
            own = [next(found) for _ in scoring.texts]
            self._in_loop(_resolve, scoring.answer, own)

    def _call(self, function: Callable, answer: asyncio.Future):
        try:
            result = function()
        except Exception as error:
            self._in_loop(_resolve, answer, None, error)
        else:
            self._in_loop(_resolve, answer, result)

    def _in_loop(self, function: Callable, *arguments):
        self._loop.call_soon_threadsafe(function, *arguments)


class Answer:
    """Pieces of the jobs of one request, as they come.

    It is a context: what is not finished at its end is cancelled.
    """

    def __init__(self, worker: Worker, num_jobs: int):
        self.num_jobs, self.pieces = num_jobs, asyncio.Queue()
        self._worker = worker

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._worker.close(self)

    async def __aiter__(self):
        """Yields (number of the job, Piece). Raises RequestError for what cannot be had."""
        unfinished = self.num_jobs
        while unfinished:
            number, piece = await self.pieces.get()
            if isinstance(piece, RequestError):
                raise piece
            unfinished -= piece.finish is not None
            yield number, piece


def broken() -> RequestError:
    """Returns the error of requests where the device's thread has failed."""
    return RequestError(
        "the model has failed and this server ends: see its log, and start it again",
        status=500,
        code="model_failed",
    )


def _resolve(answer: asyncio.Future, result=None, error: BaseException | None = None):
    if answer.done():  # the client went
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)
