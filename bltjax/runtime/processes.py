"""Finds and connects the processes of a run; `peers` ends them together.

Every process runs the same command. Process 0 alone writes progress and metrics.
"""

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bltjax.runtime import peers, roll_call

START_SECONDS = 300  # in which all processes must have come


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
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(
            f"{names['coordinator']}={given['coordinator']!r} must be HOST:PORT, "
            "with a port from 1 to 65535"
        )


def _on_tpu_vm() -> bool:
    devices = Path("/dev/accel0").exists() or any(Path("/dev").glob("vfio/[0-9]*"))
    return devices and importlib.util.find_spec("libtpu") is not None


def join(cluster: Cluster | None):
    """Connects this process to the others; to be called before JAX looks for devices.

    What other processes than process 0 print is dropped; errors are not. Raises ValueError where
    the address cannot be used, where the processes were not started as one run, and where some have
    not come in START_SECONDS. Where the platform knows the address, a process that waits longer
    than that ends with one line.
    """
    if cluster is None:
        return
    if cluster.arguments.get("coordinator_address"):
        roll_call.answer(**_called(cluster.arguments), seconds=START_SECONDS)
    import jax

    # No call here looks for devices: where that fails, the others must be told.
    jax.config.update("jax_enable_preemption_service", False)  # we handle the signals
    late = threading.Timer(START_SECONDS, _give_up, args=(cluster,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **cluster.arguments,
            initialization_timeout=2 * START_SECONDS,  # JAX would abort
            heartbeat_timeout_seconds=2 * peers.MISSED_SECONDS,  # and here
            shutdown_timeout_seconds=peers.MISSED_SECONDS,
        )
    except RuntimeError as error:
        raise ValueError(f"the processes of this run cannot be connected: {error}") from error
    finally:
        late.cancel()
    if threading.current_thread() is threading.main_thread():
        # JAX aborts where process 0 is gone: without a dump of all threads, which absl enables.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
    index, count = peers.place()
    if index:
        sys.stdout.flush()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # of C++ code, too
    print(f"{count} processes, found by {cluster.name}", flush=True)


def _called(arguments: Mapping) -> dict:
    host, _, port = arguments["coordinator_address"].rpartition(":")
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[2]
    return dict(
        host=host.strip("[]"),
        port=int(port),
        bound=int(bound or port),
        count=arguments["num_processes"],
        index=arguments["process_id"],
    )


def _give_up(cluster: Cluster):
    peers.leave(
        peers.CRASHED,
        f"error: not all processes of this run, as {cluster.name} names them, have come within "
        f"{START_SECONDS} seconds: read the logs of the others, and start all of them again\n",
    )
