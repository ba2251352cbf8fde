"""Stops a run before Google Compute Engine takes its machine away, as SIGTERM would.

The metadata server of a machine announces that a spot machine is preempted and that a machine ends
for maintenance. A process that was started over ssh may get no SIGTERM at all, and one that never
asks for maintenance is not told of it. The server holds back its answer until something changes, so
nothing is asked often. Whatever the server does, an error here is no error of the run.
"""

import os
import signal
import threading
import time
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlencode

from bltjax.runtime.signals import say

HOST = "GCE_METADATA_HOST"  # HOST or HOST:PORT of the server, as in Google's libraries
USUAL_HOST = "metadata.google.internal"
NO_CHECK = "NO_GCE_CHECK"  # "true": this is no machine of Google's, as there
PRODUCT = Path("/sys/class/dmi/id/product_name")  # "Google Compute Engine", in containers too
FLAVOR = {"Metadata-Flavor": "Google"}  # of requests and of answers
ENDS = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
WAIT_SECONDS = 60  # in which the server answers, though nothing has changed
PATIENCE_SECONDS = 10  # for what it should answer at once
RETRY_SECONDS = 10  # after an error
TRIES = 3  # of the first request; where none is answered, there is no such server
LEAST_SECONDS = 1  # between requests of a server that does not hold back its answer
MOST_BYTES = 200  # of an answer


def watch(environ: Mapping[str, str]):
    """Starts to watch for the end of this machine; sends this process SIGTERM when it is announced.

    What was announced before is told and stops nothing: the same command must be able to go on.
    Does nothing where neither the environment nor the machine names a metadata server.
    """
    host = environ.get(HOST) or (USUAL_HOST if _is_google() else "")
    if not host or environ.get(NO_CHECK) == "true":
        return
    for key in ENDS:
        threading.Thread(target=_watch, args=(host, key), daemon=True).start()


def _is_google() -> bool:
    try:
        return PRODUCT.read_text().startswith("Google")
    except (OSError, ValueError):
        return False


def _watch(host: str, key: str):
    known, etag, failures = None, "", 0
    while known is not None or failures < TRIES:
        asked = time.monotonic()
        try:
            value, etag = _ask(host, key, etag)
        except (OSError, HTTPException, ValueError):
            failures, etag = failures + 1, ""
            time.sleep(RETRY_SECONDS)
            continue
        announced = f"this machine will be taken away ({key}={value})"
        if value == ENDS[key] and known is None:
            say(f"{announced}, as was known before the start: going on until then")
        elif value == ENDS[key] != known:
            say(f"{announced}: stopping, as at SIGTERM")
            os.kill(os.getpid(), signal.SIGTERM)
        elif known is not None:
            time.sleep(max(0, LEAST_SECONDS - (time.monotonic() - asked)))
        known = value


def _ask(host: str, key: str, etag: str) -> tuple[str, str]:
    """Returns the value of a key, and what names it in the next request, which waits for another.

    Raises OSError, HTTPException or ValueError for whatever else is there.
    """
    path, patience = f"/computeMetadata/v1/instance/{key}", PATIENCE_SECONDS
    if etag:
        wait = dict(wait_for_change="true", last_etag=etag, timeout_sec=WAIT_SECONDS)
        path, patience = f"{path}?{urlencode(wait)}", patience + WAIT_SECONDS
    connection = HTTPConnection(host, timeout=patience)  # without proxies, which it is not behind
    try:
        connection.request("GET", path, headers=FLAVOR)
        answer = connection.getresponse()
        flavor, *_ = FLAVOR
        if answer.status != 200 or answer.headers.get(flavor) != FLAVOR[flavor]:
            raise ValueError(f"no metadata server: {answer.status}")
        return answer.read(MOST_BYTES).decode().strip(), answer.headers.get("ETag") or ""
    finally:
        connection.close()
