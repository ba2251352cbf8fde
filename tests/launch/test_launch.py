"""Scripts of launch/: what they print is what they do. Here those of one machine and of Slurm."""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import (
    JOBSET,
    LAUNCH,
    POD,
    ROOT,
    SETTINGS,
    dry,
    executable,
    launch,
    refused,
    wait_for,
)

SCRIPTS = [*LAUNCH.rglob("*.sh"), *LAUNCH.glob("*.sbatch")]


def test_shellcheck_finds_nothing():
    assert len(SCRIPTS) == 6
    shellcheck = Path(sys.executable).with_name("shellcheck")
    process = subprocess.run([shellcheck, *SCRIPTS], text=True, capture_output=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_names_what_dry_run_does(script):
    process = launch(script, "--help")
    assert "--dry-run" in process.stdout and not process.stderr
    # Bash 3.2, macOS's, has none of these.
    assert not any(word in script.read_text() for word in ("mapfile", "wait -n", "declare -A"))


@pytest.mark.parametrize(
    "script, arguments, settings, named",
    [
        ("local_mesh.sh", ["2,2", "--", "x"], {}, "'2,2'"),
        ("local_mesh.sh", ["2,-1,1", "--", "x"], {}, "'2,-1,1'"),
        ("local_mesh.sh", ["2,2,2", "--config=x"], {}, "'--config=x'"),
        ("local_processes.sh", ["0", "--", "x"], {}, "'0'"),
        ("local_processes.sh", ["--devices=x", "2", "--", "x"], {}, "--devices=x"),
        ("local_processes.sh", ["2", "x"], {}, "'x'"),
        ("tpu_vm.sh", ["frobnicate"], POD, "'frobnicate'"),
        ("tpu_vm.sh", ["run", "--config=x"], POD, "run -- --config"),
        ("tpu_vm.sh", ["delete", "x"], POD, "'x'"),
        ("tpu_vm.sh", ["logs", "first"], POD, "'first'"),
        ("tpu_vm.sh", ["status"], {**POD, "ZONE": ""}, "ZONE"),
        ("tpu_vm.sh", ["create"], {**POD, "ACCELERATOR_TYPE": ""}, "ACCELERATOR_TYPE"),
        ("tpu_vm.sh", ["create"], {**POD, "ACCELERATOR_TYPE": "tpu7x-64"}, "RUNTIME_VERSION"),
        ("tpu_vm_worker.sh", ["frobnicate"], {}, "'frobnicate'"),
        ("tpu_vm_worker.sh", ["run", "x"], {}, "/home/me/bltjax/venv/bin/python"),
        ("gke/jobset.sh", ["--config=x"], JOBSET, "launch/gke/jobset.sh -- "),
        ("gke/jobset.sh", ["--", "a\nb"], JOBSET, "line break"),
        ("gke/jobset.sh", ["--", "x"], {**JOBSET, "CLAIM": ""}, "CLAIM"),
        ("gke/jobset.sh", ["--", "x"], {**JOBSET, "NAME": "Blt"}, "NAME=Blt"),
        ("gke/jobset.sh", ["--", "x"], {**JOBSET, "SLICES": "two"}, "SLICES=two"),
        ("gke/jobset.sh", ["--", "x"], {**JOBSET, "ACCELERATOR": "h100"}, "ACCELERATOR=h100"),
        ("gke/jobset.sh", ["--", "x"], {**JOBSET, "TOPOLOGY": "4x4x8"}, "2 dimensions"),
        ("gke/jobset.sh", ["--", "x"], {**JOBSET, "CHIPS_PER_HOST": "3"}, "one of 1, 2, 4, 8"),
        *(
            ("gke/jobset.sh", ["--", "x"], {**JOBSET, "TOPOLOGY": topology}, said)
            for topology, said in {
                "3x3": "TOPOLOGY=3x3: the sizes of a slice are 1, 2 or multiples of 4",
                "2x6": "TOPOLOGY=2x6: the sizes of a slice are 1, 2 or multiples of 4",
                "0x2": "takes 2 dimensions, from 1, as in 8x8",
            }.items()
        ),
        (
            "gke/jobset.sh",
            ["--", "x"],
            {**JOBSET, "TOPOLOGY": "2x1", "CHIPS_PER_HOST": "4"},
            "does not divide the 2 chips of 2x1 into hosts: give one of 1, 2\n",
        ),
        ("gke/jobset.sh", ["--", "x"], {**JOBSET, "SPOT": "true"}, "SPOT=true"),
        ("slurm_gpu.sbatch", [], {}, "with arguments"),
        ("slurm_gpu.sbatch", ["x"], {}, "submit it with sbatch"),
        ("local_mesh.sh", ["--fast", "1,1,1", "--", "x"], {}, "--fast is not an option"),
        ("local_mesh.sh", ["1,1,1", "--", "x"], {"PYTHON": "/no python"}, "PYTHON=/no python"),
        ("local_processes.sh", ["--device=2", "2", "--", "x"], {}, "--device=2 is not an option"),
        ("local_processes.sh", ["2", "--", "x"], {"PYTHON": "/no python"}, "PYTHON=/no python"),
        ("local_processes.sh", ["2", "--", "x"], {"PORT": "65536"}, "PORT=65536: give a port"),
        ("local_processes.sh", ["2", "--", "x"], {"PORT": "http"}, "PORT=http: give a port"),
        ("tpu_vm.sh", ["--fast", "status"], POD, "--fast is not an option"),
        ("tpu_vm.sh", ["logs", "1", "2"], POD, "'2'"),
        ("tpu_vm.sh", ["status"], {**POD, "SPOT": "yes"}, "SPOT=yes"),
        ("tpu_vm.sh", ["status"], {**POD, "POLL_SECONDS": "soon"}, "POLL_SECONDS=soon"),
        ("tpu_vm_worker.sh", ["--fast", "stop"], {}, "--fast is not an option"),
    ],
)
def test_mistakes_are_named_before_anything_happens(script, arguments, settings, named):
    assert named in refused(script, *arguments, **settings)


def test_a_mesh_of_simulated_devices():
    flags = "--xla_force_host_platform_device_count=8"
    assert dry("local_mesh.sh", "2,4,1", "--", "--config=x.py", "a b", XLA_FLAGS="--a --b") == [
        f"env XLA_FLAGS=--a\\ --b\\ {flags} JAX_PLATFORMS=cpu python3 -m bltjax.train "
        "--config=x.py a\\ b --config.mesh.data=2 --config.mesh.fsdp=4 --config.mesh.tensor=1"
    ]


def test_the_interpreter_is_that_of_the_repository(tmp_path):
    copy = tmp_path / "launch/local_mesh.sh"
    copy.parent.mkdir()
    shutil.copy(LAUNCH / copy.name, copy)
    ours = executable(tmp_path / ".venv/bin/python", "echo $XLA_FLAGS $JAX_PLATFORMS $*")
    process = launch(copy, "1,1,3", "--", "x", PYTHON="")
    assert process.stdout.split() == [
        "--xla_force_host_platform_device_count=3", "cpu", "-m", "bltjax.train", "x",
        "--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=3",
    ]  # fmt: skip
    ours.unlink()
    assert " python3 -m " in dry(copy, "1,1,3", "--", "x", PYTHON="")[0]


# Process I does the I-th of the words it is given, and says what it was given.
PROCESS = """
first=${0%/*}/first
i=${!#}; i=${i#--process_id=}
word=${@:$((i + 3)):1}
echo "out $i $*"
echo "err $i" >&2
trap 'printf saved >&2; exit 75' TERM INT
case $word in
    exit*) echo $$ >"$first"; exit "${word#exit}" ;;
    killed) echo $$ >"$first"; kill -KILL $$ ;;
    stopped) echo $$ >"$first.stopped"; echo $$ >"$first"; kill -STOP $$ ;;
    noisy)
        sleep 0.5
        echo "E1127 03:21:50.310597 8581 coordination_service_agent.cc:289] Polled an error" >&2
        echo "F1127 03:21:50.310758 8581 client.h:80] Terminating process" >&2
        echo "    @     0x7f334bc80634  absl::lts_20260107::LogMessage::Flush()" >&2
        echo "process 0 of 2 is lost" >&2; exit 134 ;;
    late*)
        until [ -s "$first" ]; do sleep 0.05; done
        while [ ! -e "$first.stopped" ] && kill -0 "$(cat "$first")" 2>/dev/null; do
            sleep 0.05
        done
        sleep 0.4; exit "${word#late}" ;;
    many) yes "" | head -n 40000 ;;
    run) touch "$READY.$i"; for _ in {1..600}; do sleep 0.05; done ;;
esac
"""


@pytest.fixture
def stub(tmp_path):
    return str(executable(tmp_path / "python", PROCESS))


def test_processes_are_told_apart(stub):
    script = "local_processes.sh"
    lines = dry(script, "--devices=4", "2", "--", "a b", XLA_FLAGS="--a")
    guard = "setpriv --pdeathsig=KILL " if shutil.which("setpriv") else ""
    command = (
        f"{guard}env XLA_FLAGS=--a\\ --xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu "
        "python3 -m bltjax.train a\\ b --coordinator=127.0.0.1:12345 --num_processes=2 "
    )
    assert lines == [f"{command}--process_id=0 &", f"{command}--process_id=1 &", "wait"]

    process = launch(script, "2", "--", "exit0", "exit0", PYTHON=stub, PORT="")
    first, port = process.stdout.strip().split(" --coordinator=127.0.0.1:")
    assert first == "out 0 -m bltjax.train exit0 exit0"
    port, rest = port.split(" ", 1)
    assert 10000 <= int(port) < 32768 and rest == "--num_processes=2 --process_id=0"
    shown = process.stderr.splitlines()
    assert "err 0" in shown and "[p1] err 1" in shown
    assert f"[p1] out 1 -m bltjax.train exit0 exit0 --coordinator=127.0.0.1:{port}" in "".join(
        shown
    )


@pytest.mark.parametrize(
    "words, code, said",
    [
        ("exit75 exit75", 75, ""),
        ("late75 exit0", 75, ""),
        ("exit2 exit2", 2, ""),
        ("late134 exit2", 2, "process 1 ended with exit code 2, before the others"),
        ("exit1 late134", 1, "process 0 ended with exit code 1, before the others"),
        ("exit75 late3", 3, ""),
        ("late1 killed", 137, "process 1 was killed by SIGKILL, before the others"),
        ("killed late134", 137, "process 0 was killed by SIGKILL, before the others"),
    ],
)
def test_the_first_failure_is_named_and_its_exit_code_is_that_of_all(stub, words, code, said):
    process = launch("local_processes.sh", "2", "--", *words.split(), check=False, PYTHON=stub)
    assert process.returncode == code
    lines = [x for x in process.stderr.splitlines() if "err " not in x and "out " not in x]
    assert lines == ([f"error: {said}"] if said else [])


def test_what_jax_says_of_a_lost_process_is_kept_in_a_file(stub):
    process = launch("local_processes.sh", "2", "--", "killed", "noisy", check=False, PYTHON=stub)
    assert process.returncode == 137
    *_, word, last = process.stderr.splitlines()
    assert word == "[p1] process 0 of 2 is lost" and "Terminating" not in process.stderr
    said, directory = last.split(" is kept in ")
    assert said.startswith("error: process 0 was killed by SIGKILL, before the others; what JAX")
    kept = Path(directory)
    assert (kept / "p1.log").read_text().splitlines()[1].startswith("F1127 ")
    assert [path.name for path in kept.iterdir()] == ["p1.log"]
    shutil.rmtree(kept)


def test_a_process_that_is_stopped_is_named_and_killed(stub):
    process = launch("local_processes.sh", "2", "--", "late1", "stopped", check=False, PYTHON=stub)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last == "error: process 1 was stopped (by SIGSTOP, say), and is killed now"


def test_a_taken_port_is_named(stub):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"PORT={port} is taken" in refused(
            "local_processes.sh", "2", "--", "exit0", "exit0", PYTHON=stub, PORT=port
        )


def test_it_ends_when_all_is_shown(stub, tmp_path):
    with (tmp_path / "shown").open("w") as shown:
        command = ["bash", LAUNCH / "local_processes.sh", "2", "--", "exit0", "many"]
        subprocess.run(command, env={**SETTINGS, "PYTHON": stub}, stderr=shown, check=True)
        # Lines that a pipe holds, so that the process is long gone when the last one is shown.
        assert (tmp_path / "shown").read_text().count("[p1] \n") == 40000


# Tests may run where signals are ignored, and a process ignores what its parent did.
HEED_SIGNALS = """
import os, signal, sys
for number in signal.SIGINT, signal.SIGHUP:
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signals_reach_all_processes(stub, tmp_path, number):
    if number == signal.SIGKILL and not shutil.which("setpriv"):
        pytest.skip("only Linux can tell the children of a killed process")
    ready = tmp_path / "ready"
    command = ["bash", LAUNCH / "local_processes.sh", "2", "--", "run", "run"]
    script = subprocess.Popen(
        [sys.executable, "-c", HEED_SIGNALS, *command],
        env={**SETTINGS, "PYTHON": stub, "READY": str(ready), "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: Path(f"{ready}.0").exists() and Path(f"{ready}.1").exists())
    if number == signal.SIGKILL:
        script.kill()
    else:
        os.killpg(script.pid, number)  # as a terminal does
    shown = script.communicate(timeout=20)[1]  # ends when no process holds stderr
    if number == signal.SIGKILL:
        assert "saved" not in shown
    else:
        assert script.returncode == 75
        # The last line of a process is shown though it has no end.
        assert "[p1] saved\n" in shown and shown.count("saved") == 2
        assert not list(tmp_path.glob("tmp.*"))


SRUN = '[ "$4 $5" = "-m bltjax.train" ] && echo "$@" && exit "$6"'


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_requeues_what_was_saved(tmp_path, code):
    executable(tmp_path / "srun", SRUN)
    executable(tmp_path / "scontrol", 'echo "$@"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    settings = dict(PATH=path, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="12")
    process = launch("slurm_gpu.sbatch", str(code), "a b", check=False, **settings)
    assert process.returncode == code
    ran = f"--kill-on-bad-exit=0 --cpus-per-task=12 python3 -m bltjax.train {code} a b"
    assert process.stdout.splitlines() == [ran, *(["requeue 7"] if code == 75 else [])]


FLAGS = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"


@pytest.mark.parametrize("own", [{}, dict.fromkeys(FLAGS, "mine")])
def test_slurm_sets_flags_that_are_not_set(tmp_path, own):
    executable(tmp_path / "srun", "".join(f'echo "${name}"\n' for name in FLAGS))
    path = f"{tmp_path}:{os.environ['PATH']}"
    settings = dict(PATH=path, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="12", HOME="/h")
    fraction, xla, cache = launch("slurm_gpu.sbatch", "x", **settings, **own).stdout.splitlines()
    if own:
        assert (fraction, xla, cache) == ("mine",) * 3
    else:
        assert float(fraction) > 0.75 and cache == "/h/.cache/bltjax/compiled"
        assert all(re.fullmatch(r"--xla_gpu_\w+=\w+", flag) for flag in xla.split())


def test_slurm_runs_one_process_for_each_gpu():
    assert dry("slurm_gpu.sbatch", "--config=x.py", "a b") == [
        'srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" '
        "python3 -m bltjax.train --config=x.py a\\ b",
        "# if that ends with exit code 75:",
        'scontrol requeue "$SLURM_JOB_ID"',
    ]
    text = (LAUNCH / "slurm_gpu.sbatch").read_text().splitlines()
    # Slurm reads options up to the first line that is something else.
    head = itertools.takewhile(lambda line: line.startswith("#"), text)
    options = dict(line.split(" --")[1].split("=", 1) if "=" in line else (line, "")
                   for line in head if line.startswith("#SBATCH "))  # fmt: skip
    assert options["ntasks-per-node"] == options["gpus-per-node"] and options["cpus-per-task"]
    assert options["signal"] == "TERM@120" and options["open-mode"] == "append"
    assert "#SBATCH --requeue" in options


def test_the_image_has_what_the_package_needs():
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    names = [name for name, _ in steps]
    copied = [word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    # The code comes after the packages, so that their layer is kept when it changes.
    installs = [i for i, step in enumerate(steps) if "pip install" in step[1]]
    code = steps.index(["COPY", "bltjax bltjax"])
    assert len(installs) == 2 and installs[0] < code < installs[1]
    assert steps[-2:] == [["USER", "1000"], ["ENTRYPOINT", '["python", "-m"]']]
    assert ["FROM", "python:3.12-slim"] in steps and "ARG" in names
    # Each value of EXTRA is an extra of the package, but for cpu, which needs none.
    case = next(rest for name, rest in steps if name == "RUN" and rest.startswith("case"))
    case = case.split(" esac")[0] + ' esac; echo "$extras"'
    provided = (ROOT / "pyproject.toml").read_text()
    for extra, wanted in ("tpu", "gcs,data,tpu"), ("cuda", "gcs,data,cuda"), ("cpu", "gcs,data"):
        process = subprocess.run(
            ["sh", "-c", case], env=dict(EXTRA=extra), text=True, capture_output=True
        )
        assert process.stdout.strip() == wanted
        assert all(f"\n{name} = " in provided for name in wanted.split(","))
    assert (
        subprocess.run(
            ["sh", "-c", case], env=dict(EXTRA="gpu"), stderr=subprocess.DEVNULL
        ).returncode
        == 2
    )
