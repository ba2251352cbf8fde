"""The process: listens, answers until a signal comes, finishes what runs, and ends."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Sequence

import jax
import uvicorn
from starlette.middleware.cors import CORSMiddleware

from bltjax.runtime import signals
from bltjax.serving.app import Server, Settings
from bltjax.serving.metrics import Metrics
from bltjax.serving.warm_up import warm_up
from bltjax.serving.worker import Worker

LOOK_SECONDS = 0.05  # between looks at whether the last answers are out


class ModelFailed(Exception):
    """Raised where the thread that owns the device has failed."""


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket at an address; port 0 is any free one. Nobody is answered yet.

    Raises ValueError for an address that cannot be had.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ValueError(
            f"cannot listen at {host}:{port} ({error.strerror}): give another --port or --host"
        ) from None
    return found


def serve(model, scheduler, where: socket.socket, settings: Settings, max_open: int) -> dict:
    """Answers requests until SIGTERM or Ctrl-C, and returns what was done.

    At the first signal running answers are finished and others refused, at the second the process
    ends at once. Raises ModelFailed.
    """
    return asyncio.run(_serve(model, scheduler, where, settings, max_open))


async def _serve(model, scheduler, where, settings: Settings, max_open: int) -> dict:
    metrics = Metrics()
    jax.monitoring.register_event_duration_secs_listener(metrics.note)
    warming = warm_up(scheduler) if settings.warm_up else None
    worker = Worker(scheduler, model.log_probs, model.mesh, metrics, max_open, warming)
    app = Server(model, worker, metrics, settings)
    config = uvicorn.Config(
        _for_browsers(app, settings.origins),
        loop="none",
        lifespan="off",
        access_log=False,
        log_level="error",
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    web = _Web(config)
    ending = Ending(app, web)
    worker.start(on_death=ending.begin)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.on_signal, number)
    await web.serve(sockets=[where])
    if worker.failure is not None:
        raise ModelFailed(f"the model failed: {worker.failure!r}") from worker.failure
    worker.stop()
    return dict(requests=app.num_answered, new_bytes=scheduler.stats.new_bytes)


def _for_browsers(app: Server, origins: Sequence[str]):
    """Returns the application, which lets pages of these origins ask and read answers."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )


class Ending:
    """The end of the server: it waits for the answers that are being written."""

    def __init__(self, app: Server, web: uvicorn.Server):
        self._app, self._web, self._task = app, web, None

    def on_signal(self, number: int):
        """Begins to end; ends the process at once where that has begun before."""
        if self._task is not None:
            signals.end_command(number)
        signals.say("ending: running answers are finished first, another signal ends them")
        self.begin()

    def begin(self):
        """Refuses new requests, and lets the process end when no request is being answered."""
        self._app.draining = True
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._wait())

    async def _wait(self):
        while self._app.at_work:
            await asyncio.sleep(LOOK_SECONDS)
        self._web.should_exit = True


class _Web(uvicorn.Server):
    """uvicorn's server without its own handlers of signals."""

    def capture_signals(self):
        return contextlib.nullcontext()
