"""Files that grow, of a directory in a bucket, where objects do not: written locally, then sent."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bltjax.runtime import buckets
from bltjax.runtime.paths import is_remote


class Scratch:
    """A directory to write files of another one in, and `publish`, which sends what has changed."""

    def __init__(self, path: Path, target: Path | None = None):
        self.path, self._target = path, target
        self._sent: dict[Path, tuple[int, int]] = {}

    def publish(self):
        """Sends each file that has changed, as a whole. Raises OSError where one does not arrive.

        Does nothing where the files are in their place already.
        """
        if self._target is None:
            return
        for path in sorted(self.path.rglob("*")):
            if not path.is_file():
                continue
            state = _state(path)
            if self._sent.get(path) != state:
                buckets.upload(path, self._target / path.relative_to(self.path).as_posix())
                self._sent[path] = state

    def fetch(self, name: str):
        """Reads a file that is in its place already, if it is."""
        path = self.path / name
        if self._target is not None:
            with contextlib.suppress(FileNotFoundError):
                path.write_bytes(buckets.read(self._target / name))
                self._sent[path] = _state(path)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def scratch_of(directory: Path, *known: str) -> Iterator[Scratch]:
    """Yields a Scratch of a directory: the directory itself, or a local one for one in a bucket.

    known: names of files that are there from the start, if the bucket has them. What was written
    until the block ends is sent, also after an error, which is the one that is told.
    """
    if not is_remote(directory):
        yield Scratch(directory)
        return
    with tempfile.TemporaryDirectory(prefix="bltjax-", ignore_cleanup_errors=True) as local:
        scratch = Scratch(Path(local), directory)
        for name in known:
            scratch.fetch(name)
        try:
            yield scratch
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.publish()
            raise
        scratch.publish()
