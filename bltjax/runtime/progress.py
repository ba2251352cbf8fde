"""Progress bars for long jobs, on stderr."""

import shutil
import sys
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


def progress_bar(label: str, total: int, shown: bool = True) -> tqdm:
    """Returns a bar over `total` bytes, to `update` with each piece that is done, and to `close`.

    A terminal shows one line that is rewritten, a log a line every LOG_SECONDS.
    """
    bar = dict(desc=label, total=total, unit="B", unit_scale=True, miniters=1, disable=not shown)
    if sys.stderr.isatty():
        columns, lines = shutil.get_terminal_size()  # tqdm shows nothing where both are 0
        return tqdm(**bar, file=sys.stderr, ncols=columns, nrows=lines)
    return tqdm(**bar, file=_Log(), mininterval=LOG_SECONDS, delay=LOG_SECONDS)
