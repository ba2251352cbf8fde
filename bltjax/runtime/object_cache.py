"""Local copies of objects in buckets: whole ones, checked, and no more bytes than are allowed.

A copy has the name of its content, so a newer object never has an older copy. Each is compared with
the checksum that the bucket has, when it arrives and when a process uses it for the first time; one
that is broken or not whole is fetched again. Where copies take more than the bound, those that were
not used for longest are deleted; a file that is open stays readable.
"""

import atexit
import base64
import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from bltjax.runtime import buckets
from bltjax.runtime.paths import is_remote
from bltjax.runtime.system_errors import writing

MAX_BYTES = 200_000_000_000
READ_BYTES = 2**20  # in memory at a time
PARTIAL = ".partial"


class Settings(NamedTuple):
    """Place of the copies, "" for the user's cache directory, and their bytes at most."""

    directory: str = ""
    max_bytes: int = MAX_BYTES


_settings = Settings()
_known: dict[str, buckets.Object] = {}  # objects that were there when this process asked
_checked: set[Path] = set()  # copies that this process has compared


def use(settings: Settings):
    """Has this process keep its copies by these settings."""
    global _settings
    _settings = settings


def settings() -> Settings:
    """Returns the settings of this process, for others that it starts."""
    return _settings


def directory() -> Path:
    """Returns the directory of the copies, which is made."""
    usual = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.path.expanduser(_settings.directory or f"{usual}/bltjax"))
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def learn(folder: Path):
    """Looks which objects are below a directory, in one request for a thousand."""
    for name, found in buckets.below(folder).items():
        _known[f"{os.fspath(folder)}/{name}"] = found


def is_known(path: Path) -> bool:
    """Returns whether an object was there when this process last looked; makes no request."""
    return os.fspath(path) in _known


def known(path: Path) -> buckets.Object | None:
    """Returns what is known of an object, asking for one that was not there before."""
    name = os.fspath(path)
    if name not in _known and (found := buckets.found(path)) is not None:
        _known[name] = found
    return _known.get(name)


def forget(path: Path):
    """Has an object looked for again, since it may have changed."""
    _known.pop(os.fspath(path), None)


def local_copy(path: Path) -> Path:
    """Returns a local copy of an object. Raises FileNotFoundError where there is none."""
    found = known(path)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    copy = directory() / _name(path, found)
    if not (copy.exists() and (copy in _checked or _is_whole(copy, found))):
        _fetch(path, found, copy)
    _checked.add(copy)
    with contextlib.suppress(OSError):
        os.utime(copy)
    return copy


def drop(path: Path):
    """Deletes the copy of an object, which is fetched anew when it is next asked for."""
    if (found := known(path)) is not None:
        copy = directory() / _name(path, found)
        _checked.discard(copy)
        copy.unlink(missing_ok=True)
    forget(path)


def send(source: Path, target: Path):
    """Writes a local file as an object and keeps it as the copy of that."""
    buckets.upload(source, target)
    forget(target)
    found = known(target)
    if found is not None and _is_whole(source, found):
        with contextlib.suppress(OSError):  # another disk
            os.replace(source, directory() / _name(target, found))
    _make_room()


def on_disk(path: Path) -> Path:
    """Returns a directory; of one in a bucket a local copy, which lasts as long as the process."""
    if not is_remote(path):
        return path
    learn(path)
    made = Path(tempfile.mkdtemp(prefix="directory-", dir=directory()))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    for name in buckets.below(path):
        target = made / path.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(local_copy(path / name), target)
    return made / path.name


def _fetch(path: Path, found: buckets.Object, copy: Path):
    with writing(copy), tempfile.TemporaryDirectory(prefix="object-", dir=copy.parent) as scratch:
        partial = Path(scratch) / f"object{PARTIAL}"
        buckets.download(path, partial)
        if not _is_whole(partial, found):
            forget(path)
            raise OSError(f"{path} did not arrive as it is stored, or has changed: run it again")
        os.replace(partial, copy)
    _make_room(copy)


def _name(path: Path, found: buckets.Object) -> str:
    content = found.md5 or f"{os.fspath(path)} {found.generation}"
    return f"{hashlib.sha256(content.encode()).hexdigest()[:32]}-{found.size}"


def _is_whole(copy: Path, found: buckets.Object) -> bool:
    """Returns whether a copy has the bytes of an object; their number, where it has no checksum."""
    with contextlib.suppress(FileNotFoundError), copy.open("rb") as file:
        if os.fstat(file.fileno()).st_size != found.size:
            return False
        digest = hashlib.md5(usedforsecurity=False)
        while block := file.read(READ_BYTES):
            digest.update(block)
        return found.md5 in ("", base64.b64encode(digest.digest()).decode())
    return False


def _make_room(newest: Path | None = None):
    """Deletes the copies that were not used for longest, until the others are within the bound."""
    there = []
    for path in directory().rglob("*"):
        with contextlib.suppress(OSError):  # another process has deleted it
            if path.is_file():
                there.append((path.stat().st_mtime, path.stat().st_size, path))
    left = sum(size for _, size, _ in there)
    for _, size, path in sorted(there):
        if left <= _settings.max_bytes:
            return
        if path != newest and path.suffix != PARTIAL:
            with contextlib.suppress(OSError):
                path.unlink()
                left -= size
