"""Counters of the server, in the text format of Prometheus."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of JAX
ROWS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters that `/metrics` shows. Any thread may count."""

    def __init__(self):
        disable_created_metrics()  # a second line for each counter
        self.registry = CollectorRegistry()
        own = dict(registry=self.registry)
        self.requests = Counter(
            "bltjax_requests", "Answers, by path and status of HTTP.", ("path", "status"), **own
        )
        self.waiting = Gauge("bltjax_waiting", "Texts that wait for a row.", **own)
        self.running = Gauge("bltjax_running", "Texts that are being written.", **own)
        self.new_bytes = Counter("bltjax_new_bytes", "Bytes written.", **own)
        self.prompt_bytes = Counter("bltjax_prompt_bytes", "Bytes of prompts.", **own)
        self.steps = Counter("bltjax_steps", "Steps of all rows at once.", **own)
        self.global_calls = Counter(
            "bltjax_global_calls", "Calls of the global transformer after prompts.", **own
        )
        self.compilations = Counter(
            "bltjax_compilations", "Programs compiled, or taken from a cache on disk.", **own
        )
        self.rows = Histogram("bltjax_rows", "Rows at work in a step.", buckets=ROWS, **own)
        self.first_byte = Histogram(
            "bltjax_first_byte_seconds", "From a request to the first byte of its answer.", **own
        )
        self._totals = dict(steps=0, global_calls=0, new_bytes=0)

    def stepped(self, stats, num_finished: int):
        """Takes over the totals of the scheduler after a step, which finished so many texts."""
        self.show(stats)
        self.rows.observe(stats.running + num_finished)
        for name, before in self._totals.items():
            self._totals[name] = getattr(stats, name)
            getattr(self, name).inc(self._totals[name] - before)

    def note(self, event: str, seconds: float, **_):
        """Counts compilations, as a listener of `jax.monitoring`."""
        if event == COMPILED:
            self.compilations.inc()

    def show(self, stats):
        """Takes over how many texts wait and are being written."""
        self.waiting.set(stats.waiting)
        self.running.set(stats.running)

    def text(self) -> bytes:
        """Returns all of it as Prometheus reads it."""
        return generate_latest(self.registry)
