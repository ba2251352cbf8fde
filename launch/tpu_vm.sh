#!/usr/bin/env bash
# A slice of Cloud TPU VMs (v2 to v6e): makes it, trains on it, brings it back. See --help.
set -euo pipefail

usage() {
    cat <<'EOF'
launch/tpu_vm.sh [--dry-run] COMMAND

  create             ask for the slice (a queued resource; it may wait for hours)
  status             what became of that: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, FAILED, ...
  install            this code and a Python with all it needs, on every worker
  run -- ARGUMENTS   start bltjax.train with these arguments on every worker, in the background
  logs [N|all]       follow the log of worker N (default 0), or show the end of all logs
  stop               all workers save the same step and stop; returns when they have, and `run`
                     again goes on
  resume -- ARGUMENTS
                     wait until the slice is there, asking anew if it was taken away, then install
                     and run: training goes on where it was saved. Also the one command to give
                     after `create`.
  delete             give the slice back; what is on its disks is lost

With --workdir=gs://BUCKET/RUN among the arguments all that is to be kept lies in the bucket, which
the service account of the VMs must be allowed to read and write.

--dry-run   print the commands and do nothing

Settings, from the environment:
  NAME, ZONE, PROJECT   of the slice
  ACCELERATOR_TYPE      v5litepod-64, v5p-128, v6e-64, ... (create, resume)
  RUNTIME_VERSION       the image of the VMs; default: the one that belongs to ACCELERATOR_TYPE
  SPOT=1                cheaper, and taken away at any time (create, resume)
  NFS=HOST:/SHARE       instead of a bucket: mounted at /runs on every worker, for
                        --workdir=/runs/... (install, resume)
  POLL_SECONDS          between two looks at a slice that is not there yet; default: 60 (resume)
EOF
}

fail() {
    echo "error: $1" >&2
    exit 2
}

need() {
    local setting
    for setting in "$@"; do
        [ "${!setting:-}" ] || fail "$setting is not set: export it, see launch/tpu_vm.sh --help"
    done
}

# Runs a command, or prints it with --dry-run.
do_() {
    if [ "$dry_run" ]; then
        printf '%q' "$1"
        printf ' %q' "${@:2}"
        echo
    else
        "$@"
    fi
}

on_workers() {
    do_ gcloud compute tpus tpu-vm ssh "$slice" "${where[@]}" "--worker=$1" "--command=$2"
}

create() {
    need ACCELERATOR_TYPE
    local runtime=${RUNTIME_VERSION:-}
    if [ -z "$runtime" ]; then
        case "$ACCELERATOR_TYPE" in
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v[234]-*) runtime=tpu-ubuntu2204-base ;;
            *) fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE is not known here: set RUNTIME_VERSION to \
its image, or use launch/gke/jobset.sh, which TPU7x and newer need" ;;
        esac
    fi
    local create=(
        gcloud compute tpus queued-resources create "$slice" "--node-id=$slice" "${where[@]}"
        "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$runtime"
    )
    if [ "${SPOT:-}" = 1 ]; then create+=(--spot); fi
    do_ "${create[@]}"
}

status() {
    do_ gcloud compute tpus queued-resources describe "$slice" "${where[@]}" \
        '--format=value(state.state)'
}

install() {
    local archive=${TMPDIR:-/tmp}/bltjax-$slice.tar.gz
    do_ tar -czf "$archive" -C "$root" --exclude=__pycache__ \
        bltjax configs launch pyproject.toml setup.py requirements.txt README.md LICENSE
    do_ gcloud compute tpus tpu-vm scp "$archive" "$slice:bltjax.tar.gz" "${where[@]}" --worker=all
    local unpack mount=
    if [ "${NFS:-}" ]; then mount=$(printf ' %q' "$NFS"); fi
    unpack='rm -rf ~/bltjax/incoming && mkdir -p ~/bltjax/incoming'
    unpack+=' && tar -xzf ~/bltjax.tar.gz -C ~/bltjax/incoming'
    on_workers all "$unpack && bash ~/bltjax/incoming/launch/tpu_vm_worker.sh install$mount"
}

run() {
    # Quoted once more, for the shells of the workers.
    on_workers all "bash ~/bltjax/code/launch/tpu_vm_worker.sh run$(printf ' %q' "$@")"
}

logs() {
    if [ "$1" = all ]; then
        on_workers all 'hostname; tail -n 20 ~/bltjax/train.log'
    else
        on_workers "$1" 'tail -n 100 -F ~/bltjax/train.log'
    fi
}

stop() {
    # One is told, and tells the others: a TERM that comes late would cut off their saving.
    on_workers 0 'bash ~/bltjax/code/launch/tpu_vm_worker.sh stop'
    on_workers all 'bash ~/bltjax/code/launch/tpu_vm_worker.sh wait_until_stopped'
}

resume() {
    need ACCELERATOR_TYPE
    if [ "$dry_run" ]; then
        status
        echo "# if that says SUSPENDED or FAILED:"
        delete
        create
        echo "# when it says ACTIVE:"
    else
        local state waited=
        while true; do
            state=$(status)
            echo "$slice is $state" >&2
            case "$state" in
                ACTIVE) break ;;
                SUSPENDED | FAILED)
                    # What FAILED before may be an old request; one that fails now would again.
                    [ "$state" = SUSPENDED ] || [ -z "$waited" ] ||
                        fail "the request for $slice FAILED, often for want of quota for \
$ACCELERATOR_TYPE in $ZONE: read why with gcloud compute tpus queued-resources describe $slice \
${where[*]}, mend it, and resume"
                    delete
                    create
                    ;;
            esac
            waited=1
            sleep "${POLL_SECONDS:-60}"
        done
    fi
    install
    run "$@"
}

delete() {
    do_ gcloud compute tpus queued-resources delete "$slice" "${where[@]}" --force --quiet
}

dry_run=
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage && exit ;;
        --dry-run) dry_run=1 && shift ;;
        -*) fail "$1 is not an option: see launch/tpu_vm.sh --help" ;;
        *) break ;;
    esac
done
command=${1:-}
case "$command" in
    create | status | install | stop | delete)
        [ $# -eq 1 ] || fail "$command takes no '$2': see launch/tpu_vm.sh --help"
        ;;
    logs)
        [ $# -le 2 ] || fail "logs takes no '$3': see launch/tpu_vm.sh --help"
        [[ ${2:-0} =~ ^([0-9]+|all)$ ]] ||
            fail "'$2' is no worker: give logs the number of one, or all"
        ;;
    run | resume)
        [ "${2:-}" = -- ] && [ $# -gt 2 ] ||
            fail "$command needs arguments of bltjax.train: $command -- --config=... --workdir=..."
        ;;
    *) fail "'$command' is not a command: see launch/tpu_vm.sh --help" ;;
esac
need NAME ZONE PROJECT
[[ ${SPOT:-} =~ ^[01]?$ ]] || fail "SPOT=$SPOT: give 1 for spot machines, or leave it out"
[[ ${POLL_SECONDS:-60} =~ ^[0-9.]+$ ]] || fail "POLL_SECONDS=$POLL_SECONDS: give a number of seconds"
[ "$dry_run" ] || command -v gcloud >/dev/null ||
    fail "gcloud is not installed: install it, or use --dry-run"
slice=$NAME
where=("--zone=$ZONE" "--project=$PROJECT")
root=$(cd "$(dirname "$0")/.." && pwd)

case "$command" in
    logs) logs "${2:-0}" ;;
    run | resume) "$command" "${@:3}" ;;
    *) "$command" ;;
esac
