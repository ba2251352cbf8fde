"""Progress of long jobs: bars on stderr, lines around what is silent, durations."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

OnProgress = Callable[[int], None] | None  # called with the amount of work just done
LOG_SECONDS = 10  # between lines of a log, so that short jobs are silent


class _Log:
    """Stream of a bar that is shown in a log: each new state becomes a line."""

    shown = ""

    def write(self, text: str):
        if text.strip() not in ("", self.shown):
            self.shown = text.strip()
            sys.stderr.write(f"{self.shown}\n")

    def flush(self):
        sys.stderr.flush()


def progress_bar(label: str, total: int, shown: bool = True, unit: str = "B") -> tqdm:
    """Returns a bar over `total` bytes, to `update` with each piece that is done, and to `close`.

    unit: of what is counted, where it is not bytes. A terminal shows one line that is rewritten, a
    log a line every LOG_SECONDS.
    """
    bar = dict(desc=label, total=total, unit=unit, unit_scale=True, miniters=1)
    bar["disable"] = not shown
    if sys.stderr.isatty():
        columns, lines = shutil.get_terminal_size()  # tqdm shows nothing where both are 0
        return tqdm(**bar, file=sys.stderr, ncols=columns, nrows=lines)
    return tqdm(**bar, file=_Log(), mininterval=LOG_SECONDS, delay=LOG_SECONDS)


@contextlib.contextmanager
def announced(what: str):
    """Prints what begins, for work that is silent until it is done, and then how long it took."""
    began = time.perf_counter()
    print(what, flush=True)
    yield
    print(f"{what} took {format_seconds(time.perf_counter() - began)}", flush=True)


def format_seconds(seconds: float) -> str:
    """Formats a duration: 45s, 3m07s, 2h05m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
