"""Objects in buckets of Google Cloud Storage: whole reads and writes, and writes on a condition.

The extra `gcs` brings the libraries; nothing here imports them before a path in a bucket is given.
Every error is an OSError of one line with the remedy. Each write is one upload: an object is there
as a whole or not at all. STORAGE_EMULATOR_HOST names another server, as in Google's libraries.
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

EMULATOR = "STORAGE_EMULATOR_HOST"
TENSORSTORE = "TENSORSTORE_GCS_HTTP_URL"
TIMEOUT_SECONDS = 60  # of a request
MOST_AT_ONCE = 8  # requests
RETRY_SECONDS = 120  # in which a request that may be repeated is


class Changed(OSError):
    """Raised where an object is not of the generation that a write is meant for."""


class Unreachable(OSError):
    """Raised where a bucket cannot be asked: no network, no credentials, no permission."""


class Object(NamedTuple):
    """An object as it is now."""

    size: int
    md5: str  # base64; "" of one that was composed of others
    generation: int  # changes with each write


def opened(text: str) -> Path:
    """Returns a path in a bucket. Raises OSError where the bucket is not to be read."""
    bucket, _ = split(text)
    _check(bucket)
    from etils import epath

    return epath.Path(text)


def split(path: str | os.PathLike) -> tuple[str, str]:
    """Returns the names of bucket and object. Raises ValueError for a path without a bucket."""
    bucket, _, name = os.fspath(path).partition("://")[2].partition("/")
    if not bucket:
        raise ValueError(f"{path} names no bucket: give gs://BUCKET/NAME")
    return bucket, name.strip("/")


@functools.cache
def _check(bucket: str):
    """Raises OSError where a bucket is not there, or is not to be read; asks once a process."""
    if importlib.util.find_spec("gcsfs") is None:  # brings the others
        raise OSError(f"gs://{bucket} needs libraries: pip install 'bltjax[gcs]'")
    _configure()
    with _told(f"gs://{bucket}", is_bucket=True):
        for _ in _client().list_blobs(bucket, max_results=1, **_patience()):
            pass


@functools.cache
def _configure():
    """Has the libraries keep no listings, and ask the server that the environment names."""
    import fsspec

    for library in ("gcsfs", "google.auth"):  # whose errors are raised as well
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for protocol in ("gcs", "gs"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    # Names with / are all that is used here; to look for real directories takes a minute where
    # only the older interface of the service answers.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    if EMULATOR in os.environ:
        os.environ.setdefault(TENSORSTORE, os.environ[EMULATOR])


def read(path: str | os.PathLike) -> bytes:
    """Reads an object. Raises FileNotFoundError where there is none."""
    with _told(path):
        return _blob(path).download_as_bytes(**_patience())


def read_object(path: str | os.PathLike) -> tuple[bytes, int] | None:
    """Reads an object with its generation; None where there is none."""
    try:
        with _told(path):
            blob = _blob(path)
            return blob.download_as_bytes(**_patience()), int(blob.generation)
    except FileNotFoundError:
        return None


def write(
    path: str | os.PathLike, data: bytes, generation: int | None = None, seconds: float = 0
) -> int:
    """Writes an object; returns its generation.

    generation: that which the write replaces, 0 where there must be none yet. seconds: in which it
    is tried, 0 for the usual number. Raises Changed where there is another, unless it has the same
    content: a write whose answer was lost is tried again, and finds itself.
    """
    try:
        with _told(path):
            blob = _blob(path)
            blob.upload_from_string(
                data,
                "application/octet-stream",
                if_generation_match=generation,
                **_patience(seconds),
            )
            return int(blob.generation)
    except Changed:
        there = read_object(path)
        if there is None or there[0] != data:
            raise
        return there[1]


def delete(path: str | os.PathLike, generation: int | None = None):
    """Deletes an object; one that is not there is no error, nor one of another generation."""
    with contextlib.suppress(FileNotFoundError, Changed), _told(path):
        _blob(path).delete(if_generation_match=generation, **_patience())


def found(path: str | os.PathLike) -> Object | None:
    """Returns what an object is now; None where there is none."""
    try:
        with _told(path):
            blob = _blob(path)
            blob.reload(**_patience())
    except FileNotFoundError:
        return None
    return _object(blob)


def below(directory: str | os.PathLike) -> dict[str, Object]:
    """Returns all objects below a directory by name, however deep."""
    return _listed(directory)[0]


def bytes_below(directory: str | os.PathLike) -> int:
    """Returns the bytes of all objects below a directory."""
    return sum(found.size for found in below(directory).values())


def entries(directory: str | os.PathLike) -> tuple[dict[str, Object], list[str]]:
    """Returns the objects of a directory by name, and the names of the directories in it."""
    return _listed(directory, delimiter="/")


def _listed(directory, **options) -> tuple[dict[str, Object], list[str]]:
    bucket, name = split(directory)
    prefix = f"{name}/" if name else ""
    with _told(directory):
        pages = _client().list_blobs(bucket, prefix=prefix, **options, **_patience())
        objects = {blob.name.removeprefix(prefix): _object(blob) for blob in pages}
    folders = sorted(folder.removeprefix(prefix).rstrip("/") for folder in pages.prefixes)
    objects.pop("", None)  # what consoles write for an empty directory
    return objects, folders


def upload(source: Path, target: str | os.PathLike):
    """Writes a local file as an object."""
    with _told(target):
        _blob(target).upload_from_filename(os.fspath(source), checksum="md5", **_patience())


def upload_below(source: Path, target: str | os.PathLike):
    """Writes all files below a local directory as objects."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            upload(path, f"{os.fspath(target)}/{path.relative_to(source).as_posix()}")


def download(source: str | os.PathLike, target: Path):
    """Writes an object to a local file, and compares size and checksum with the server's."""
    from google.cloud.storage.exceptions import DataCorruption

    try:
        with _told(source):
            _blob(source).download_to_filename(os.fspath(target), checksum="md5", **_patience())
    except DataCorruption as error:
        raise OSError(f"{source} did not arrive as it is stored: run it again") from error


def copy(source: str | os.PathLike, target: str | os.PathLike):
    """Copies an object inside its bucket, on the server."""
    with _told(source):
        blob = _blob(source)
        blob.bucket.copy_blob(blob, blob.bucket, split(target)[1], **_patience())


def delete_below(directory: str | os.PathLike):
    """Deletes all objects below a directory."""
    names = below(directory)
    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        list(pool.map(lambda name: delete(f"{os.fspath(directory)}/{name}"), names))


def move_below(source: str | os.PathLike, target: str | os.PathLike):
    """Moves all objects below a directory; those that are copied are deleted after the last."""
    source, target = os.fspath(source), os.fspath(target)
    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        list(pool.map(lambda name: copy(f"{source}/{name}", f"{target}/{name}"), below(source)))
    delete_below(source)


def _object(blob) -> Object:
    return Object(int(blob.size), blob.md5_hash or "", int(blob.generation))


def _blob(path):
    bucket, name = split(path)
    return _client().bucket(bucket).blob(name)


@functools.cache
def _client():
    """Returns the client of this process, which threads share as in Google's transfer manager."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    test = dict(credentials=AnonymousCredentials()) if EMULATOR in os.environ else {}
    return storage.Client(project="bltjax" if test else None, **test)


def _patience(seconds: float = 0) -> dict:
    from google.cloud.storage.retry import DEFAULT_RETRY

    limit = seconds or RETRY_SECONDS
    return dict(timeout=min(limit, TIMEOUT_SECONDS), retry=DEFAULT_RETRY.with_timeout(limit))


@contextlib.contextmanager
def _told(path, is_bucket: bool = False):
    """Raises an OSError of one line for what the libraries raise."""
    from google.api_core import exceptions as api
    from google.auth.exceptions import GoogleAuthError
    from requests import RequestException

    path = os.fspath(path)
    bucket = f"gs://{split(path)[0]}"
    try:
        yield
    except api.PreconditionFailed as error:
        raise Changed(f"{path} was written by another process") from error
    except api.NotFound as error:
        if is_bucket or "bucket does not exist" in str(error):
            raise OSError(f"there is no bucket {bucket}: check its name, or create it") from error
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
    except (api.Forbidden, api.Unauthorized) as error:
        raise Unreachable(
            f"{path} may not be used by this account: give it the role Storage Object Admin "
            f"(roles/storage.objectAdmin) of {bucket}, or choose another bucket"
        ) from error
    except GoogleAuthError as error:
        raise Unreachable(
            f"{path} needs credentials, and there are none: run `gcloud auth application-default "
            "login`, or name a key file in GOOGLE_APPLICATION_CREDENTIALS"
        ) from error
    except (api.GoogleAPIError, RequestException) as error:
        reason = " ".join(str(error).split())[:200]
        raise Unreachable(
            f"{path} cannot be reached ({reason}): check the network, and run it again"
        ) from error
