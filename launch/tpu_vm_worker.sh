#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker of a slice; everything lies in ~/bltjax. See --help.
set -euo pipefail

usage() {
    cat <<'EOF'
launch/tpu_vm_worker.sh [--dry-run] COMMAND

  install [HOST:/SHARE]   ~/bltjax/incoming becomes ~/bltjax/code, with a Python of its own in
                          ~/bltjax/venv; the NFS share, if one is given, is mounted at /runs
  run ARGUMENTS           start bltjax.train in the background; its log is ~/bltjax/train.log
  train ARGUMENTS         the same in the foreground, with copies of records of at most 40 GB in
                          ~/bltjax/cache, and compiled programs in gs://BUCKET/compiled for
                          --workdir=gs://BUCKET/..., else in ~/bltjax/compiled
  stop                    tell the training to save and stop, and wait until it has
  wait_until_stopped      wait only: it was told by another worker

Called by launch/tpu_vm.sh.
--dry-run   print the commands and do nothing
EOF
}

fail() {
    echo "error: $1" >&2
    exit 2
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

# The id may be that of another process by now.
is_running() {
    grep -qs bltjax.train "/proc/$(cat "$home/train.pid" 2>/dev/null)/cmdline"
}

refuse_if_running() {
    ! is_running ||
        fail "training is running on $(hostname): stop it first, with launch/tpu_vm.sh stop"
}

# Versions must be the same on all workers; a line from each shows it.
check='import platform, sys
from importlib.metadata import version
assert sys.version_info >= (3, 11), f"Python {sys.version} is too old: 3.11 is needed"
print(platform.node(), "Python", platform.python_version(), "jax", version("jax"))'

install() {
    refuse_if_running
    do_ rm -rf "$home/code"
    do_ mv "$home/incoming" "$home/code"
    # The images may have Python 3.10, for which pip takes years-old packages without a word.
    do_ python3 -m pip install --quiet --user uv
    do_ "$uv" venv --quiet --allow-existing --python 3.12 "$home/venv"
    do_ "$uv" pip install --quiet --python "$python" --editable "$home/code[tpu,gcs,data]"
    do_ "$python" -c "$check"
    if [ "${1:-}" ] && ! mountpoint -q /runs; then
        # A fresh machine has no lists of packages, and installs updates of its own.
        do_ sudo apt-get update -qq -o DPkg::Lock::Timeout=300
        do_ sudo apt-get install -y -qq -o DPkg::Lock::Timeout=300 nfs-common
        do_ sudo mkdir -p /runs
        do_ sudo mount -t nfs "$1" /runs
        do_ sudo chmod 1777 /runs
    fi
}

run() {
    refuse_if_running
    if [ "$dry_run" ]; then
        printf '(cd %q && setsid bash launch/tpu_vm_worker.sh train' "$home/code"
        printf ' %q' "$@"
        printf ' >>%q 2>&1 </dev/null &)\n' "$home/train.log"
    else
        [ -x "$python" ] || fail "$python is missing on $(hostname): use launch/tpu_vm.sh install"
        cd "$home/code"
        setsid bash launch/tpu_vm_worker.sh train "$@" >>"$home/train.log" 2>&1 </dev/null &
    fi
}

train() {
    # Collectives beside the computation, as MaxText sets them for v5e to v6e: by the compiled program
    # v6e gathers weights so, and v5e does by itself. Not measured. What is set already stays.
    export LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS---xla_tpu_enable_async_collective_fusion=true \
--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_enable_async_collective_fusion_multiple_steps=true \
--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true}
    # A restart compiles nothing again. Worker 0 alone writes programs: only in a bucket the others,
    # and the next slice, find them.
    local compiled=$home/compiled argument
    for argument in "$@"; do
        [[ ! $argument =~ ^--?workdir=(gs://[^/]+) ]] || compiled=${BASH_REMATCH[1]}/compiled
    done
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$compiled}
    # Boot disks have 100 GB. The last of two equal settings counts.
    local train=(
        "$python" -m bltjax.train
        "--config.data.cache=$home/cache" --config.data.cache_bytes=40000000000 "$@"
    )
    if [ "$dry_run" ]; then
        do_ env "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS" \
            "JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR" "${train[@]}"
        return
    fi
    "${train[@]}" &
    local pid=$! code=0
    echo "$pid" >"$home/train.pid"
    wait "$pid" || code=$?
    # The next training may have written its own by now.
    if [ "$(cat "$home/train.pid" 2>/dev/null)" = "$pid" ]; then rm -f "$home/train.pid"; fi
    echo "bltjax.train ended with exit code $code"
    return "$code"
}

stop() {
    if [ "$dry_run" ]; then
        # shellcheck disable=SC2016 # To be pasted into a shell of the worker.
        printf 'kill -TERM "$(cat %q)"\n' "$home/train.pid"
    elif is_running; then
        kill -TERM "$(cat "$home/train.pid")" || true # It may have just ended.
    fi
    wait_until_stopped
}

wait_until_stopped() {
    if [ "$dry_run" ]; then
        echo "# when that process has ended:"
    else
        while is_running; do sleep 0.2; done
        echo "no training is running on $(hostname)"
    fi
    do_ rm -f "$home/train.pid"
}

dry_run=
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage && exit ;;
        --dry-run) dry_run=1 && shift ;;
        -*) fail "$1 is not an option: see launch/tpu_vm_worker.sh --help" ;;
        *) break ;;
    esac
done
home=$HOME/bltjax
uv=$HOME/.local/bin/uv
python=$home/venv/bin/python
case "${1:-}" in
    install | run | train | stop | wait_until_stopped) "$@" ;;
    *) fail "'${1:-}' is not a command: see launch/tpu_vm_worker.sh --help" ;;
esac
