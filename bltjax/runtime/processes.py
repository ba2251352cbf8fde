"""Several processes as one run: they find each other, and they end together.

Every process runs the same command. Process 0 alone writes progress and metrics. When one of them
fails, or is asked to stop, it tells the others, which would otherwise wait for it in a collective
until a timeout: each process prints the failure last, and ends.
"""

import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bltjax.runtime.signals import STOPPED, Stopped, handling

CRASHED = 1  # exit code
HEARTBEAT_SECONDS = 30  # after which a process that was killed is missed
START_SECONDS = 300  # in which all processes must have come
LOOK_SECONDS = 1.0  # between looks for the failure of another process
LINGER_SECONDS = 5.0  # in which process 0, whom all ask, goes on answering after a failure
FAILURE = "bltjax/failure"


class Cluster(NamedTuple):
    """Processes of a run: who named them, and the arguments of `jax.distributed.initialize`."""

    name: str
    arguments: dict  # empty where JAX asks the cluster itself


def find_cluster(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Cluster | None:
    """Finds the processes of this run in the arguments, or else the environment; None if alone.

    Returns None for a process alone. coordinator: HOST:PORT of process 0, which listens there.
    Raises ValueError where something is missing, no number or no address.
    """
    given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    if any(value is not None for value in given.values()):
        return Cluster("flags", _addresses(given, {name: f"--{name}" for name in given}))
    names = dict(
        coordinator="JAX_COORDINATOR_ADDRESS",
        num_processes="JAX_NUM_PROCESSES",
        process_id="JAX_PROCESS_ID",
    )
    found = {key: environ.get(name) for key, name in names.items()}
    if found["num_processes"] or found["process_id"]:
        return Cluster("JAX_COORDINATOR_ADDRESS", _addresses(found, names))
    platform = _platform(environ)
    if found["coordinator"]:  # JAX reads it, and takes the numbers from the platform
        if platform is None:
            _addresses(found, names)
        _check_address(found, names)
    return platform


def _platform(environ: Mapping[str, str]) -> Cluster | None:
    """Returns the platform that started several processes; platforms are asked in JAX's order."""
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return Cluster("Open MPI", {})
        if importlib.util.find_spec("mpi4py"):
            return Cluster("Open MPI", dict(cluster_detection_method="mpi4py"))
        raise ValueError(
            "this Open MPI does not say where process 0 is: install mpi4py, or give --coordinator, "
            "--num_processes and --process_id"
        )
    # An allocation without srun has no nodes of a step, or one that is a shell, of a single task.
    tasks = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    if "SLURM_STEP_NODELIST" in environ and _number(environ, tasks) > 1:
        return Cluster("Slurm", {})
    if not (environ.get("JAX_PLATFORMS") or "tpu").startswith("tpu"):
        return None
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if "," in (workers or "") or _number(environ, "MEGASCALE_NUM_SLICES") > 1:
        return Cluster("TPU slice", {})
    # A single worker may have a name that nobody resolves, such as "local".
    if workers is None and "TPU_SKIP_MDS_QUERY" not in environ and _on_tpu_vm():
        return Cluster("Cloud TPU", {})
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name) or "1"
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} must be a number")
    return int(text)


def _addresses(given: Mapping, names: Mapping[str, str]) -> dict:
    missing = [names[key] for key, value in given.items() if value in (None, "")]
    if missing:
        have = [names[key] for key, value in given.items() if value not in (None, "")]
        raise ValueError(f"{', '.join(have)} without {', '.join(missing)}: give all three")
    try:
        count, index = int(given["num_processes"]), int(given["process_id"])
    except ValueError as error:
        raise ValueError(
            f"{names['num_processes']}={given['num_processes']!r} and {names['process_id']}="
            f"{given['process_id']!r} must be numbers"
        ) from error
    if not 0 <= index < count:
        raise ValueError(
            f"{names['process_id']}={index} must be at least 0 and below "
            f"{names['num_processes']}={count}"
        )
    _check_address(given, names)
    return dict(
        coordinator_address=given["coordinator"],
        num_processes=count,
        process_id=index,
        # Else JAX asks platforms for more all the same, and some of them do not answer.
        cluster_detection_method="deactivate",
    )


def _check_address(given: Mapping, names: Mapping[str, str]):
    host, _, port = given["coordinator"].rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError(f"{names['coordinator']}={given['coordinator']!r} must be HOST:PORT")


def _on_tpu_vm() -> bool:
    devices = Path("/dev/accel0").exists() or any(Path("/dev").glob("vfio/[0-9]*"))
    return devices and importlib.util.find_spec("libtpu") is not None


def join(cluster: Cluster | None):
    """Connects this process to the others; to be called before JAX looks for devices.

    What other processes than process 0 print is dropped; errors are not. Where the others do not
    come in time, JAX aborts the process (exit code 134).
    """
    if cluster is None:
        return
    import jax

    # No call here looks for devices: where that fails, the others must be told.
    jax.config.update("jax_enable_preemption_service", False)  # we handle the signals
    with handling(signal.SIG_DFL):  # ours would not be called before all have come
        jax.distributed.initialize(
            **cluster.arguments,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    index, count = _place()
    if index:
        sys.stdout.flush()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # of C++ code, too
    print(f"{count} processes, found by {cluster.name}", flush=True)


@contextlib.contextmanager
def ending_together():
    """Ends all processes, with the traceback of the first failure, when the block fails in one.

    The exit code is that of SystemExit and of `Stopped`, and else CRASHED. In a run of one process
    the error comes through.
    """
    if _place()[1] == 1:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=[over], daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        with handling(signal.SIG_IGN):  # the process is leaving already
            over.set()
            watcher.join()  # not to end in the middle of its last words
            _leave(**_tell(error))
    finally:
        over.set()
        watcher.join()


def _code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else CRASHED
    return STOPPED if isinstance(error, Stopped) else CRASHED


def _tell(error: BaseException) -> dict:
    """Tells the others of an error, unless one of them was first; returns the first failure.

    The first may be why this process failed: one that leaves breaks the collectives of the others.
    """
    index, count = _place()
    who = f"process {index} of {count}"
    if isinstance(error, SystemExit):  # a command that has said in one line what is wrong
        said = error.__context__ or f"exit code {error.code}"
        text = f"{who} ended: {said}\n"
    elif isinstance(error, Stopped):
        text = f"{who}: {error}\n"
    else:
        text = f"{who} failed:\n{''.join(traceback.format_exception(error))}"
    told = dict(code=_code(error), text=text)
    with contextlib.suppress(Exception):  # another was first, or nobody is left to tell
        _client().key_value_set(FAILURE, json.dumps(told))
        return told
    with contextlib.suppress(Exception):
        return json.loads(_client().key_value_try_get(FAILURE))
    return told


def _watch(over: threading.Event):
    """Ends this process when another one has failed."""
    while not over.wait(LOOK_SECONDS):
        try:
            told = json.loads(_client().key_value_try_get(FAILURE))
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            told = dict(code=CRASHED, text=f"process 0 does not answer any more: {error}\n")
        _leave(**told)


def _leave(code: int, text: str):
    """Ends this process, and not by `sys.exit`, which waits for the others at a barrier."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if _place()[0] == 0:
        time.sleep(LINGER_SECONDS)
    sys.stderr.flush()
    with open(os.dup(2), "w") as last_words, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # what other threads print now
        last_words.write(text)
    os._exit(code)


def _place() -> tuple[int, int]:
    """Returns the index of this process, and the number of processes."""
    state = _state()
    return state.process_id or 0, state.num_processes or 1


def _client():
    return _state().client


def _state():
    # The coordination service's keys and values have no public name, and the public functions that
    # count processes look for devices first.
    from jax._src import distributed

    return distributed.global_state
