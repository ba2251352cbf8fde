"""TPU VMs and GKE: scripts on a fake cloud, and a JobSet against its schema."""

import gzip
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launching import JOBSET, POD, ROOT, dry, executable, launch, wait_for

# Survives every level of quoting, or shows which one it does not.
AWKWARD = ["--config.stages=('blt', 'evaluate')", "it's $HOME", '"\\" `id` $(id) *', "", "é"]


WHERE = "--zone=us-east5-b --project=mine"
CREATE = f"gcloud compute tpus queued-resources create pod --node-id=pod {WHERE} "
DESCRIBE = f"gcloud compute tpus queued-resources describe pod {WHERE} "
DELETE = f"gcloud compute tpus queued-resources delete pod {WHERE} --force --quiet"
SSH = f"gcloud compute tpus tpu-vm ssh pod {WHERE} "


def commands(lines):
    """Lines of a shell as words, spaces joined: the quoting is the shell's business."""
    return [" ".join(shlex.split(line, comments=True)) for line in lines]


@pytest.mark.parametrize(
    "accelerator, runtime",
    [
        ("v6e-64", "v2-alpha-tpuv6e"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_each_accelerator_has_its_image(accelerator, runtime):
    settings = {**POD, "ACCELERATOR_TYPE": accelerator}
    command = CREATE + f"--accelerator-type={accelerator} --runtime-version="
    assert dry("tpu_vm.sh", "create", **settings) == [command + runtime]
    settings.update(SPOT="1", RUNTIME_VERSION="mine")
    assert dry("tpu_vm.sh", "create", **settings) == [command + "mine --spot"]


def test_a_slice_is_made_used_and_given_back():
    unpack = (
        "rm -rf ~/bltjax/incoming && mkdir -p ~/bltjax/incoming"
        " && tar -xzf ~/bltjax.tar.gz -C ~/bltjax/incoming"
        " && bash ~/bltjax/incoming/launch/tpu_vm_worker.sh install 10.0.0.2:/runs"
    )
    create = CREATE + "--accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e"
    status = DESCRIBE + "--format=value(state.state)"
    install = [
        f"tar -czf /tmp/bltjax-pod.tar.gz -C {ROOT} --exclude=__pycache__ "
        "bltjax configs launch pyproject.toml setup.py requirements.txt README.md LICENSE",
        "gcloud compute tpus tpu-vm scp /tmp/bltjax-pod.tar.gz pod:bltjax.tar.gz "
        f"{WHERE} --worker=all",
        f"{SSH}--worker=all --command={unpack}",
    ]
    worker = "bash ~/bltjax/code/launch/tpu_vm_worker.sh"
    run = f"{SSH}--worker=all --command={worker} run --config=x.py a\\ b"  # quoted for its shell
    expected = {
        "status": [status],
        "install": install,
        "run -- --config=x.py a_b": [run],
        "logs": [f"{SSH}--worker=0 --command=tail -n 100 -F ~/bltjax/train.log"],
        "logs 3": [f"{SSH}--worker=3 --command=tail -n 100 -F ~/bltjax/train.log"],
        "logs all": [f"{SSH}--worker=all --command=hostname; tail -n 20 ~/bltjax/train.log"],
        "stop": [
            f"{SSH}--worker=0 --command={worker} stop",
            f"{SSH}--worker=all --command={worker} wait_until_stopped",
        ],
        "resume -- --config=x.py a_b": [status, "", DELETE, create, "", *install, run],
        "delete": [DELETE],
    }
    for words, lines in expected.items():
        arguments = [word.replace("_", " ") for word in words.split()]
        printed = dry("tpu_vm.sh", *arguments, NFS="10.0.0.2:/runs", **POD)
        assert commands(printed) == lines


def test_what_a_worker_is_told():
    home = "/home/me/bltjax"
    lines = commands(dry("tpu_vm_worker.sh", "install", "10.0.0.2:/share"))
    check = lines.pop(5)
    assert check.startswith(f"{home}/venv/bin/python -c ") and ">= (3, 11)" in check
    assert lines == [
        f"rm -rf {home}/code",
        f"mv {home}/incoming {home}/code",
        "python3 -m pip install --quiet --user uv",
        f"/home/me/.local/bin/uv venv --quiet --allow-existing --python 3.12 {home}/venv",
        f"/home/me/.local/bin/uv pip install --quiet --python {home}/venv/bin/python "
        f"--editable {home}/code[tpu,gcs,data]",
        "sudo apt-get update -qq -o DPkg::Lock::Timeout=300",
        "sudo apt-get install -y -qq -o DPkg::Lock::Timeout=300 nfs-common",
        "sudo mkdir -p /runs",
        "sudo mount -t nfs 10.0.0.2:/share /runs",
        "sudo chmod 1777 /runs",
    ]
    assert dry("tpu_vm_worker.sh", "run", "a b") == [
        f"(cd {home}/code && setsid bash launch/tpu_vm_worker.sh train a\\ b "
        f">>{home}/train.log 2>&1 </dev/null &)"
    ]
    for workdir, compiled in (
        ("/runs/a", f"{home}/compiled"),
        ("gs://mine/a/b", "gs://mine/compiled"),
        ("gs://mine", "gs://mine/compiled"),
    ):
        (train,) = dry("tpu_vm_worker.sh", "train", "a b", f"--workdir={workdir}")
        env, flags, cache, *command = shlex.split(train)
        assert env == "env" and cache == f"JAX_COMPILATION_CACHE_DIR={compiled}"
        assert flags.startswith("LIBTPU_INIT_ARGS=--xla_tpu_enable_async_collective_fusion=true ")
        told = [*trained(f"{home}/cache"), "a b", f"--workdir={workdir}"]
        assert command == [f"{home}/venv/bin/python", *told]
    own = dict(LIBTPU_INIT_ARGS="", JAX_COMPILATION_CACHE_DIR="/mine")
    (train,) = dry("tpu_vm_worker.sh", "train", "--workdir=gs://mine/a", **own)
    assert shlex.split(train)[1:3] == [f"{name}={value}" for name, value in own.items()]
    assert dry("tpu_vm_worker.sh", "stop") == [
        f'kill -TERM "$(cat {home}/train.pid)"',
        *dry("tpu_vm_worker.sh", "wait_until_stopped"),
    ]


def trained(cache):
    """Words of the training before those that are given, which win where they are settings."""
    bounds = f"--config.data.cache={cache}", "--config.data.cache_bytes=40000000000"
    return ["-m", "bltjax.train", *bounds]


# Logs its arguments and plays a cloud of one worker, whose home is a directory here.
GCLOUD = """
printf '%s\\n' "$3 $4" >>"$CLOUD/calls"
last=${!#}
case "$3 $4" in
    "queued-resources describe")
        read -r state <"$CLOUD/states"
        sed -i 1d "$CLOUD/states"
        echo "$state" ;;
    "tpu-vm scp") cp "$5" "$CLOUD/home/bltjax.tar.gz" ;;
    "tpu-vm ssh") cd "$CLOUD/home" && HOME=$CLOUD/home bash -c "${last#--command=}" ;;
esac
"""
# The real interpreter checks the version, of packages that are there; the rest is for the log.
UV = """
case "$1" in
    venv) mkdir -p "${!#}/bin" && cp "$CLOUD/worker_python" "${!#}/bin/python" ;;
    *) [ "$*" = "pip install --quiet --python $HOME/bltjax/venv/bin/python \
--editable $HOME/bltjax/code[tpu,gcs,data]" ] ;;
esac
"""
WORKER_PYTHON = """
if [ "$1" = -c ]; then exec "$REAL_PYTHON" "$@"; fi
test -f bltjax/commands/train.py || exit 9
printf '<%s>' "$@"
echo
trap 'sleep 0.3; echo saved; exit 75' TERM
for _ in {1..600}; do sleep 0.05; done
"""


def cloud(tmp_path, *states):
    """Settings of a slice that is found in these states, one after the other."""
    executable(tmp_path / "bin/gcloud", GCLOUD)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    return dict(
        POD,
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        CLOUD=str(tmp_path),
        TMPDIR=str(tmp_path),
        REAL_PYTHON=sys.executable,
        POLL_SECONDS="0",
    )


@pytest.mark.parametrize(
    "states, calls",
    [
        ("FAILED FAILED", "describe delete create describe"),
        ("SUSPENDED FAILED", "describe delete create describe"),
        ("WAITING_FOR_RESOURCES FAILED", "describe describe"),
    ],
)
def test_a_request_that_fails_is_not_made_for_ever(tmp_path, states, calls):
    settings = cloud(tmp_path, *states.split())
    process = launch("tpu_vm.sh", "resume", "--", "x", check=False, **settings)
    assert process.returncode == 2
    *seen, error = process.stderr.splitlines()
    assert seen == [f"pod is {state}" for state in states.split()]
    assert error.startswith("error: ") and "v6e-64 in us-east5-b" in error
    assert f"{DESCRIBE.strip()}, mend it, and resume" in error
    expected = [f"queued-resources {call}" for call in calls.split()]
    assert (tmp_path / "calls").read_text().splitlines() == expected


def test_a_slice_that_was_taken_away_comes_back_and_trains(tmp_path):
    executable(tmp_path / "bin/python3", '[ "$*" = "-m pip install --quiet --user uv" ]')
    executable(tmp_path / "home/.local/bin/uv", UV)
    executable(tmp_path / "worker_python", WORKER_PYTHON)
    settings = cloud(tmp_path, "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE")
    process = launch("tpu_vm.sh", "resume", "--", *AWKWARD, **settings)
    assert process.stderr.splitlines() == [
        "pod is SUSPENDED",
        "pod is WAITING_FOR_RESOURCES",
        "pod is ACTIVE",
    ]
    assert "Python 3." in process.stdout  # each worker's versions
    queued = "queued-resources "
    assert (tmp_path / "calls").read_text().splitlines() == [
        *(queued + verb for verb in ("describe", "delete", "create", "describe", "describe")),
        *("tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"),
    ]

    log = tmp_path / "home/bltjax/train.log"
    before = trained(tmp_path / "home/bltjax/cache")
    told = "".join(f"<{word}>" for word in (*before, *AWKWARD))
    wait_for(lambda: log.exists() and log.read_text() == f"{told}\n")
    pid = tmp_path / "home/bltjax/train.pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    for again in ("run", "--"), ("install",):  # a second training would take the TPU's place
        arguments = (*again, "x") if again[0] == "run" else again
        assert (
            "training is running" in launch("tpu_vm.sh", *arguments, check=False, **settings).stderr
        )
    assert told in launch("tpu_vm.sh", "logs", "all", **settings).stdout

    # One after the other, as after a change of code: `stop` is over when the saving is.
    assert "no training is running" in launch("tpu_vm.sh", "stop", **settings).stdout
    assert "saved\n" in log.read_text() and not pid.exists()
    launch("tpu_vm.sh", "install", **settings)
    wait_for(lambda: log.read_text().endswith("\nbltjax.train ended with exit code 75\n"))
    launch("tpu_vm.sh", "run", "--", "again", **settings)
    again = "".join(f"<{word}>" for word in (*before, "again"))
    wait_for(lambda: log.read_text().endswith(f"{again}\n"))
    wait_for(lambda: pid.exists() and pid.read_text())
    os.kill(int(pid.read_text()), signal.SIGTERM)  # it ends by itself
    wait_for(lambda: not pid.exists())


def test_stop_ends_no_process_but_the_training(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        pid = tmp_path / "bltjax/train.pid"
        pid.parent.mkdir()
        pid.write_text(f"{other.pid}\n")
        process = launch("tpu_vm_worker.sh", "stop", HOME=str(tmp_path))
        assert "no training is running" in process.stdout and not pid.exists()
        assert other.poll() is None
        other.kill()


LOGGED_GCLOUD = """
printf '%q ' "$@" | tr '\\n' ' ' >>"$CLOUD/calls"
echo >>"$CLOUD/calls"
case "$*" in
    *" queued-resources describe "*) echo ACTIVE ;;
    "projects describe "*) echo 1234 ;;
esac
"""


def test_the_commands_of_the_page_do_what_it_says(tmp_path):
    """From an empty project to a resumed spot run: the block as it is pasted into a shell."""
    page = (ROOT / "launch/README.md").read_text()
    section = page.partition("## From an empty project")[2].partition("\n## ")[0]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)[1]
    assert len(block.replace("\\\n", " ").strip().splitlines()) == 10
    executable(tmp_path / "gcloud", LOGGED_GCLOUD)
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = dict(PATH=path, HOME=str(tmp_path), TMPDIR=str(tmp_path), CLOUD=str(tmp_path))
    subprocess.run(["bash", "-euc", block], cwd=ROOT, env=env, check=True, capture_output=True)
    calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    where = ["--zone=us-east5-b", "--project=my-project"]
    asked, made, _, granted, copied, created, *resumed, deleted = calls
    assert asked[:2] == ["services", "enable"] and "tpu.googleapis.com" in asked
    assert made[:4] == ["storage", "buckets", "create", "gs://my-runs"]
    assert "--location=us-east5" in made
    account = "serviceAccount:1234-compute@developer.gserviceaccount.com"
    assert f"--member={account}" in granted and "--role=roles/storage.objectAdmin" in granted
    assert copied[-1] == "gs://my-runs/corpus"
    slice_ = ["blt", "--node-id=blt", *where, "--accelerator-type=v6e-64"]
    assert created[3:] == ["create", *slice_, "--runtime-version=v2-alpha-tpuv6e", "--spot"]
    assert deleted[3:5] == ["delete", "blt"]
    runs = [call[-1] for call in resumed if "tpu_vm_worker.sh run " in call[-1]]
    assert len(runs) == 2 and runs[0] == runs[1]
    told = "--workdir=gs://my-runs/blt_1b --config.data.root=gs://my-runs/corpus"
    assert f"run --config=configs/blt_1b.py {told} --config.mesh.fsdp=8" in runs[0]


@pytest.fixture(scope="module")
def jobset_schema():
    path = Path(__file__).parents[1] / "golden_data" / "jobset/jobset.schema.json.gz"
    return jsonschema.Draft202012Validator(json.loads(gzip.decompress(path.read_bytes())))


def jobset(*arguments, **settings):
    lines = dry("gke/jobset.sh", "--", *arguments, **{**JOBSET, **settings})
    assert lines[-1] == "EOF"
    return yaml.safe_load("\n".join(lines[1:-1]))


@pytest.mark.parametrize(
    "accelerator, topology, settings, slices, hosts, chips",
    [
        ("tpu-v6e-slice", "8x8", {}, 1, 16, 4),
        ("tpu-v6e-slice", "8x8", dict(SLICES="2", SPOT="1"), 2, 16, 4),
        ("tpu-v6e-slice", "2x4", dict(CHIPS_PER_HOST="8"), 1, 1, 8),
        ("tpu-v5-lite-podslice", "1x1", {}, 1, 1, 1),
        ("tpu-v5p-slice", "4x4x8", dict(SLICES="4"), 4, 32, 4),
        ("tpu7x", "2x2x1", {}, 1, 1, 4),
    ],
)
def test_a_jobset_has_a_pod_for_each_host(
    jobset_schema, accelerator, topology, settings, slices, hosts, chips
):
    made = jobset("--config=x.py", ACCELERATOR=accelerator, TOPOLOGY=topology, **settings)
    jobset_schema.validate(made)
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["replicas"] == slices
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert hosts * chips == math.prod(int(n) for n in topology.split("x"))
    selector = {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    if "SPOT" in settings:
        selector["cloud.google.com/gke-spot"] = "true"
    assert pod["nodeSelector"] == selector
    assert ("tolerations" in pod) == ("SPOT" in settings)


def test_a_jobset_restarts_what_a_restart_can_mend():
    made = jobset("x", MAX_RESTARTS="7")
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert rule["onExitCodes"]["values"] == [2, 3]
    assert pod["terminationGracePeriodSeconds"] == 120
    assert made["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"


@pytest.mark.parametrize("slices, between", [("1", False), ("2", True)])
def test_a_jobset_sets_flags_that_are_not_set(slices, between):
    def environment(**settings):
        made = jobset("x", SLICES=slices, **settings)
        pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        return {line["name"]: line["value"] for line in pod["containers"][0]["env"]}

    own = dict(LIBTPU_INIT_ARGS="", JAX_COMPILATION_CACHE_DIR="/runs/mine")
    assert environment(**own) == own
    found = environment()
    assert found["JAX_COMPILATION_CACHE_DIR"] == "/runs/compiled"
    libtpu = found["LIBTPU_INIT_ARGS"].split()
    assert all(re.fullmatch(r"--xla_\w+=true", flag) for flag in libtpu)
    assert any("data_parallel" in flag for flag in libtpu) == between


@pytest.mark.parametrize(
    "claim, workdir, compiled, mounted",
    [
        ("", "gs://mine/runs/a", "gs://mine/compiled", {"/cache", "/dev/shm"}),
        ("runs", "/runs/a", "/runs/compiled", {"/cache", "/dev/shm", "/runs"}),
        ("runs", "gs://mine/a", "gs://mine/compiled", {"/cache", "/dev/shm", "/runs"}),
    ],
)
def test_a_jobset_keeps_its_run_in_a_bucket_or_a_claim(
    jobset_schema, claim, workdir, compiled, mounted
):
    made = jobset(f"--workdir={workdir}", CLAIM=claim)
    jobset_schema.validate(made)
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {line["name"]: line["value"] for line in container["env"]}
    assert environment["JAX_COMPILATION_CACHE_DIR"] == compiled
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == mounted
    assert sorted(mounts) == sorted(volume["name"] for volume in pod["volumes"])


def test_arguments_reach_the_container_as_they_are(jobset_schema):
    made = jobset(*AWKWARD, "yes", "12")
    jobset_schema.validate(made)
    container = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    # Kubernetes reads $$( as $(, which alone would name a variable.
    given = [argument.replace("$$(", "$(") for argument in container["args"]]
    assert given == [*trained("/cache")[1:], *AWKWARD, "yes", "12"]
    assert "$$(id)" in container["args"][5]


def test_kubectl_is_given_what_was_printed(tmp_path):
    executable(tmp_path / "kubectl", f'echo "$@" >{tmp_path}/given; cat >>{tmp_path}/given')
    settings = dict(JOBSET, NAMESPACE="team", PATH=f"{tmp_path}:{os.environ['PATH']}")
    printed = launch("gke/jobset.sh", "--dry-run", "--", *AWKWARD, **settings).stdout
    assert printed.startswith("kubectl --namespace=team apply --filename=- <<'EOF'\n")
    assert not (tmp_path / "given").exists()
    launch("gke/jobset.sh", "--", *AWKWARD, **settings)
    given = (tmp_path / "given").read_text()
    assert given.startswith("--namespace=team apply --filename=-\napiVersion: ")
    (tmp_path / "given").unlink()
    subprocess.run(["bash", "-c", printed], env=settings, check=True)
    assert (tmp_path / "given").read_text() == given


def test_the_schema_refuses_typos_and_wrong_types(jobset_schema):
    def objects(node):
        if isinstance(node, dict):
            yield node
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list):
                yield from objects(child)

    free = {"nodeSelector", "limits", "annotations"}  # names of anybody's
    made = jobset("x", SPOT="1")
    names = [
        (node, name)
        for node in objects(made)
        for name in node
        if not any(node is other.get(key) for other in objects(made) for key in free)
    ]
    assert len(names) > 40
    for node, name in names:
        value = node.pop(name)
        node[f"{name}s"] = value
        assert not jobset_schema.is_valid(made), name
        del node[f"{name}s"]
        node[name] = [[]]  # which nothing is
        assert not jobset_schema.is_valid(made), name
        node[name] = value
    jobset_schema.validate(made)
