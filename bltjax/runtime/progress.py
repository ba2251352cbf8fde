"""How far a long job is and when it will end, on stderr."""

import sys
import time
from collections.abc import Callable

Advance = Callable[[int], None]  # told how much more has been done


def unwatched(amount: int):
    """An `Advance` for those who do not watch."""


class Progress:
    """Counts work against a total; call it with each piece that is done.

    On a terminal one line is rewritten, elsewhere a line appears every `every` seconds, so that
    short jobs stay silent and logs stay short.
    """

    def __init__(self, label: str, total: int, unit: str = "B", every: float = 10.0, stream=None):
        self.label, self.total, self.unit = label, total, unit
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.every = 0.2 if self.live else every
        self.done, self.started = 0, time.monotonic()
        self.shown = self.started if not self.live else 0.0

    def __call__(self, amount: int):
        self.done += amount
        if time.monotonic() - self.shown >= self.every:
            self._show("\r" if self.live else "", "" if self.live else "\n")
            self.shown = time.monotonic()

    def close(self):
        """End the line, if there is one."""
        if self.live:
            self._show("\r", "\n")

    def _show(self, start: str, end: str):
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        left = max(self.total - self.done, 0) / rate if rate else float("inf")
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        bar = "#" * int(20 * share)
        text = (
            f"{self.label} [{bar:<20}] {share:4.0%} {_scaled(self.done, self.unit)} of "
            f"{_scaled(self.total, self.unit)}, {_scaled(rate, self.unit)}/s, eta {_clock(left)}"
        )
        self.stream.write(f"{start}{text}{end}")
        self.stream.flush()


def _scaled(amount: float, unit: str) -> str:
    prefixes = ["", "k", "M", "G", "T"]
    while amount >= 1000 and len(prefixes) > 1:
        amount /= 1000
        prefixes.pop(0)
    return f"{amount:.3g} {prefixes[0]}{unit}"


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
