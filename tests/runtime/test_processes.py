"""How processes find each other on every platform, and how they end together."""

import signal
import subprocess
import sys

import pytest

from bltjax.runtime import peers
from bltjax.runtime import processes as distributed
from bltjax.runtime.signals import STOPPED
from tests import processes
from tests.processes import ended, free_port

pytestmark = pytest.mark.long  # one interpreter will do

SRUN = dict(SLURM_JOB_ID="1", SLURM_NTASKS="8", SLURM_PROCID="3", SLURM_LOCALID="3")
STEP = dict(SRUN, SLURM_STEP_NODELIST="node[1-2]", SLURM_STEP_NUM_TASKS="8")
GKE = dict(TPU_WORKER_ID="0", KUBERNETES_SERVICE_HOST="10.0.0.1")
MPI = dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1")
ADDRESSES = dict(
    JAX_COORDINATOR_ADDRESS="[::1]:80", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3", **STEP
)

PLACES = {  # (environment, whether there are TPU chips, what is found)
    "laptop": ({}, False, None),
    "pod of Kubernetes": (dict(KUBERNETES_SERVICE_HOST="10.0.0.1"), False, None),
    "TPU VM": ({}, True, "Cloud TPU"),
    "TPU VM, platforms empty": (dict(JAX_PLATFORMS=""), True, "Cloud TPU"),
    "TPU VM, on its CPU": (dict(JAX_PLATFORMS="cpu"), True, None),
    "TPU VM, metadata off": (dict(TPU_SKIP_MDS_QUERY="1"), True, None),
    "Kaggle": (dict(TPU_PROCESS_ADDRESSES="local", TPU_WORKER_HOSTNAMES="localhost"), True, None),
    "GKE, a host": (dict(GKE, TPU_WORKER_HOSTNAMES="localhost"), True, None),
    "GKE, a slice": (dict(GKE, TPU_WORKER_HOSTNAMES="a-0.a,a-1.a"), True, "TPU slice"),
    "GKE, a slice, on its CPU": (
        dict(GKE, TPU_WORKER_HOSTNAMES="a-0.a,a-1.a", JAX_PLATFORMS="cpu"),
        True,
        None,
    ),
    "GKE, slices of a host": (
        dict(GKE, TPU_WORKER_HOSTNAMES="a-0.a", MEGASCALE_NUM_SLICES="2"),
        True,
        "TPU slice",
    ),
    "GKE, one of one": (
        dict(GKE, TPU_WORKER_HOSTNAMES="a-0.a", MEGASCALE_NUM_SLICES="1"),
        True,
        None,
    ),
    "processes of a host": (dict(TPU_PROCESS_ADDRESSES="h:8476,h:8477"), True, "TPU slice"),
    "srun": (STEP, False, "Slurm"),
    "srun of one task": (dict(STEP, SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="1"), False, None),
    "sbatch or salloc, without srun": (SRUN, False, None),
    "salloc into a shell on a node": (dict(STEP, SLURM_STEP_NUM_TASKS="1"), False, None),
    "mpirun in salloc": (dict(STEP, **MPI, OMPI_MCA_orte_hnp_uri="1.0;tcp://h:1"), 0, "Open MPI"),
    "mpirun of one": (dict(OMPI_COMM_WORLD_SIZE="1"), False, None),
    "addresses": (ADDRESSES, True, "JAX_COORDINATOR_ADDRESS"),
    "no addresses": (dict.fromkeys(ADDRESSES, ""), False, None),
    "an address, the rest from Slurm": (dict(STEP, JAX_COORDINATOR_ADDRESS="h:1"), False, "Slurm"),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_the_processes_are_found(place, monkeypatch):
    environ, chips, expected = PLACES[place]
    monkeypatch.setattr(distributed, "_on_tpu_vm", lambda: bool(chips))
    found = distributed.find_cluster(environ)
    assert (found and found.name) == expected
    if found and found.name != "JAX_COORDINATOR_ADDRESS":
        assert found.arguments == {}  # JAX asks the platform itself


@pytest.mark.parametrize("mpi4py, said", [(None, "install mpi4py"), ("there", None)])
def test_an_open_mpi_that_says_no_address(mpi4py, said, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: mpi4py)
    if said:
        with pytest.raises(ValueError, match=said):
            distributed.find_cluster(MPI)
    else:
        found = distributed.find_cluster(MPI)
        assert found.arguments == dict(cluster_detection_method="mpi4py")


def test_addresses_are_all_that_jax_goes_by():
    expected = dict(num_processes=4, process_id=3, cluster_detection_method="deactivate")
    given = distributed.find_cluster(STEP, "host:80", 4, 3)
    assert given == ("flags", dict(expected, coordinator_address="host:80"))
    assert distributed.find_cluster(ADDRESSES).arguments == dict(
        expected, coordinator_address="[::1]:80"
    )


@pytest.mark.parametrize(
    "environ, given, named",
    [
        ({}, ("h:1", 2, None), ["--coordinator, --num_processes without --process_id"]),
        ({}, (None, None, 0), ["--process_id without --coordinator, --num_processes"]),
        ({}, ("h:1", 2, 2), ["--process_id=2", "below --num_processes=2"]),
        ({}, ("h:1", 2, -1), ["--process_id=-1", "at least 0"]),
        ({}, ("h:1", 0, 0), ["--process_id=0", "below --num_processes=0"]),
        ({}, ("host", 2, 0), ["--coordinator='host' must be HOST:PORT"]),
        ({}, (":80", 2, 0), ["--coordinator=':80'"]),
        ({}, ("host:http", 2, 0), ["--coordinator='host:http'"]),
        ({}, ("host:65536", 2, 0), ["--coordinator='host:65536'", "from 1 to 65535"]),
        ({}, ("host:0", 2, 0), ["--coordinator='host:0'"]),
        (dict(JAX_COORDINATOR_ADDRESS="h:1"), (), ["without JAX_NUM_PROCESSES, JAX_PROCESS_ID"]),
        (dict(JAX_NUM_PROCESSES="2"), (), ["JAX_NUM_PROCESSES without JAX_COORDINATOR_ADDRESS"]),
        (dict(ADDRESSES, JAX_PROCESS_ID="x"), (), ["JAX_PROCESS_ID='x'", "numbers"]),
        (dict(STEP, JAX_COORDINATOR_ADDRESS="h"), (), ["JAX_COORDINATOR_ADDRESS='h'"]),
        (dict(STEP, SLURM_STEP_NUM_TASKS="8(x2)"), (), ["SLURM_STEP_NUM_TASKS='8(x2)'", "number"]),
    ],
)
def test_what_is_missing_or_wrong_is_named(environ, given, named):
    with pytest.raises(ValueError) as raised:
        distributed.find_cluster(environ, *given)
    assert all(text in str(raised.value) for text in named), raised.value


# The victim is a process by its number; the other one waits, in a collective or asleep.
SCRIPT = """
import os, pathlib, signal, sys, threading, time
from bltjax import cli
from bltjax.runtime import peers, processes, signals
case, port, index = sys.argv[1], sys.argv[2], sys.argv[3]
# Only a process that is lost may be missed by its heartbeat.
peers.MISSED_SECONDS = 10 if "sleeps" in case else 200
with signals.leaving(peers.stop):
    processes.join(processes.find_cluster({}, f"127.0.0.1:{port}", 2, int(index)))
    with peers.ending_together():
        peers.agree({"same": "a", "--workdir": index if "differs" in case else "runs/a"})
        if "elsewhere" in case:
            peers.SEEN_SECONDS = 0.5
            try:
                peers.check_shared(pathlib.Path(sys.argv[4]) / index)
            except ValueError as error:
                cli.fail(error)
        peers.check_shared(pathlib.Path(sys.argv[4]))
        import jax
        from jax.experimental.multihost_utils import process_allgather
        if case == "1 has no device" and index == "1":
            jax.config.update("jax_platforms", "tpux")
        process_allgather(1)
        print("said by", index)
        os.system(f"echo a child of {index}")
        victim, what = case.split(maxsplit=1)
        if index != victim:
            process_allgather(2) if what in ("raises", "stopped", "killed") else None
            time.sleep(2 if what == "exits" else 150)
            sys.exit(0 if what == "exits" else "nobody told")
        time.sleep(1)
        if what == "exits":
            sys.exit()
        elif what == "raises":
            raise RuntimeError("the disk is full")
        elif what == "fails":
            try:
                raise ValueError("no such corpus")
            except ValueError as error:
                cli.fail(error)
        elif what == "stopped":
            again = threading.Timer(2, os.kill, [os.getpid(), signal.SIGTERM])
            again.daemon = True
            again.start()
            os.kill(os.getpid(), signal.SIGTERM)
        elif what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "sleeps":
            os.kill(os.getpid(), signal.SIGSTOP)
"""
CASES = (
    "1 exits",
    "1 raises",
    "0 fails",
    "0 stopped",
    "1 killed",
    "1 sleeps",
    "0 sleeps",
    "1 has no device",
    "1 differs",
    "1 elsewhere",
)


def ended_each(case, run):
    if "sleeps" not in case:
        return ended(run, timeout=150)
    victim = int(case[0])
    (survivor,) = ended([run[1 - victim]], timeout=150)
    run[victim].kill()
    (killed,) = ended([run[victim]], timeout=150)
    return [survivor, killed] if victim else [killed, survivor]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(exit code, stdout, stderr) of both processes, by case; at once, since they mostly wait."""
    # JAX warns of proxies; a pod's variable must not make it look for the pod.
    env = {k: v for k, v in processes.environment().items() if not k.lower().endswith("_proxy")}
    env["KUBERNETES_SERVICE_HOST"] = "127.0.0.1"
    runs = {case: (free_port(), []) for case in CASES}
    for case, (port, run) in runs.items():
        directory = tmp_path_factory.mktemp(case)
        for index in "01":
            (directory / index).mkdir()
            command = [sys.executable, "-c", SCRIPT, case, str(port), index, str(directory)]
            run.append(
                subprocess.Popen(
                    command,
                    cwd=processes.ROOT,
                    env=env,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
    try:
        yield {case: ended_each(case, run) for case, (_, run) in runs.items()}
    finally:
        for _, run in runs.values():
            for process in run:
                process.kill()


def test_a_run_that_ends_well(outcomes):
    (code, out, err), other = outcomes["1 exits"]
    assert (code, err) == (0, "")
    assert "2 processes, found by flags" in out
    assert "said by 0" in out and "a child of 0" in out
    assert other == (0, "", "")


@pytest.mark.parametrize(
    "case, code, last",
    [
        ("1 raises", peers.CRASHED, "RuntimeError: the disk is full"),
        ("0 fails", 2, "process 0 of 2 ended: no such corpus"),
        ("0 stopped", STOPPED, "process 0 of 2: stopped by SIGTERM: run the same command again"),
    ],
)
def test_a_failure_ends_all_and_is_the_last_of_every_log(outcomes, case, code, last):
    for found, _, err in outcomes[case]:
        assert found == code, err
        assert err.splitlines()[-1] in (last, last.replace("process 0 of 2 ended:", "error:"))
    logs = [err for _, _, err in outcomes[case]]
    if case == "1 raises":
        assert all(err.startswith("process 1 of 2 failed:\nTraceback") for err in logs)
    if case == "0 fails":
        assert [len(err.splitlines()) for err in logs] == [1, 1]


def test_a_process_without_its_devices_ends_all(outcomes):
    for code, _, err in outcomes["1 has no device"]:
        assert code == peers.CRASHED, err
        assert err.startswith("process 1 of 2 failed:\nTraceback"), err
        assert "tpux" in err.splitlines()[-1], err


@pytest.mark.parametrize("case", ["1 killed", "1 sleeps", "0 sleeps"])
def test_a_lost_process_is_missed_and_named(outcomes, case):
    victim = int(case[0])
    code, _, err = outcomes[case][1 - victim]
    assert outcomes[case][victim][0] == -signal.SIGKILL
    assert code == peers.CRASHED, err
    said = "is lost: it was killed" if victim else "does not answer any more"
    assert err.startswith(f"process {victim} of 2 {said}") and err.count("\n") == 1, err


def test_processes_that_run_something_else_end_at_once(outcomes):
    line = "error: process 0 has --workdir=0 and process 1 has --workdir=1: start all processes"
    for code, _, err in outcomes["1 differs"]:
        assert code == 2 and err.startswith(line) and err.count("\n") == 1, err


def test_processes_on_directories_of_one_name_end(outcomes):
    for code, _, err in outcomes["1 elsewhere"]:
        assert code == 2 and "is not the directory of process 0" in err, err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "theirs, named",
    [
        (dict(a="1", b="2"), ""),
        (dict(a="1", b="3"), "process 0 has b=2 and process 7 has b=3"),
        (dict(a="1"), "process 0 has b=2 and process 7 has b=None"),
        (dict(a="1", b="2", c="4"), "process 0 has c=None and process 7 has c=4"),
    ],
)
def test_the_first_difference_is_named(theirs, named):
    found = peers.difference(dict(a="1", b="2"), theirs, 7)
    assert found.startswith(named) and bool(found) == bool(named)


def test_one_process_is_left_alone():
    with pytest.raises(RuntimeError, match="mine"), peers.ending_together():
        raise RuntimeError("mine")
    with pytest.raises(SystemExit) as ended_with, peers.ending_together():
        sys.exit(3)
    assert ended_with.value.code == 3
