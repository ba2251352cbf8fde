"""What the stages of `accelerator_check.py` write: findings, as JSON lines, and the time left."""

import json
import time
from pathlib import Path

# Kinds of findings that every stage may have.
FAILED, IMPOSSIBLE, LATE, DONE = "error", "impossible", "late", "done"


class Notes:
    """Takes down the findings of one stage. at: seconds since the check began."""

    def __init__(self, file: Path, stage: str, started: float, seconds: float, tiny: bool):
        self.file, self.stage, self.started, self.seconds = file, stage, started, seconds
        self.tiny = tiny  # everything as small as it goes, for CPUs

    @property
    def left(self) -> float:
        """Seconds that the check has left."""
        return self.started + self.seconds - time.time()

    def write(self, kind: str, **found):
        """Writes a finding at once, since the next thing may end the process."""
        at = round(time.time() - self.started, 1)
        line = json.dumps(dict(stage=self.stage, kind=kind, at=at) | found, default=float)
        print(line, flush=True)
        with self.file.open("a") as file:
            file.write(line + "\n")

    def failed(self, error: BaseException, **found):
        """Writes that something did not work."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.write(FAILED, reason=text[:600], **found)

    def impossible(self, reason, **found):
        """Writes what this machine is not made for."""
        self.write(IMPOSSIBLE, reason=str(reason), **found)

    def late(self, reason: str, **found):
        """Writes what there was no time for."""
        self.write(LATE, reason=reason, **found)


def read_findings(file: Path) -> list[dict]:
    """Returns all findings."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]
