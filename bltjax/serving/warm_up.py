"""Compiles what usual requests run before they come, so that none of them waits for it."""

import time
from collections.abc import Iterator

from bltjax.inference.jobs import Job, Request
from bltjax.inference.sampling import Sampling
from bltjax.inference.scheduler import Scheduler
from bltjax.runtime import signals
from bltjax.runtime.progress import format_seconds
from bltjax.vocabulary import encode

# Programs depend on which steps sampling takes: OpenAI's default, greedy, and with a filter.
USUAL = (
    Sampling(temperature=1.0),
    Sampling(),
    Sampling(temperature=1.0, top_p=0.9),
)


def warm_up(scheduler: Scheduler) -> Iterator[int]:
    """Compiles programs; yields the size of their room after some of them, the smallest first.

    Says on stderr when it is done.
    """
    began = time.perf_counter()
    request = Request(encode(b"ab", add_eos=False), 1, 0)
    try:
        yield from scheduler.warm_up([Job(request, sampling) for sampling in USUAL])
    except ValueError as error:  # no memory, which larger rooms do not have either
        signals.say(f"note: long texts will be refused, lower --max_length or --rows: {error}")
    else:
        took = format_seconds(time.perf_counter() - began)
        signals.say(f"ready after {took}: usual requests compile nothing")
