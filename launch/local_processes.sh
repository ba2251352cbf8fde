#!/usr/bin/env bash
# Several real processes of bltjax.train on this machine, which train one model. See --help.
set -euo pipefail

usage() {
    cat <<'EOF'
launch/local_processes.sh [--dry-run] [--devices=D] N -- [arguments of bltjax.train]

Runs bltjax.train in N processes with D simulated CPU devices each (default 1), which find each
other over loopback: what a pod does, without the pod. Start it in the repository's root:

    launch/local_processes.sh 2 -- --config=configs/quickstart.py --workdir=runs/two

Devices of data * fsdp must divide every batch size, and those of the quickstart are small. Up to 8:

    --config.blt_training.batch_size=8 --config.entropy_training.batch_size=8 \
    --config.evaluation.batch_size=8

Output of process 0 is shown as it is, lines of the others begin with [p1], [p2], ...
Ctrl-C, TERM and HUP are passed on to all processes: they save the same step and stop.

Exit code: 0 if all processes are done, 75 if they stopped and saved, otherwise the code of the
first process that failed.

--dry-run   print the commands and do nothing
PYTHON      the interpreter; default: .venv/bin/python of the repository, else python3
PORT        of the coordinator; default: one that is free
XLA_FLAGS   kept; the number of devices is added to it
EOF
}

fail() {
    echo "error: $1" >&2
    exit 2
}

is_count() {
    [[ $1 =~ ^[1-9][0-9]{0,2}$ ]]
}

free_port() {
    # Below 32768, where systems begin to take ports for outgoing connections.
    local port=$((10000 + RANDOM % 22768))
    while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
        port=$((10000 + RANDOM % 22768))
    done
    echo "$port"
}

dry_run=
devices=1
while [ $# -gt 0 ]; do
    case "$1" in
        --help) usage && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --devices=*) devices=${1#--devices=} && shift ;;
        *) break ;;
    esac
done
is_count "$devices" || fail "--devices=$devices: give the CPU devices of a process, from 1 to 999"
number=${1:-}
is_count "$number" || fail "'$number' processes cannot be started: give a number from 1 to 999"
[ "${2:-}" = -- ] || fail "'${2:-}' stands where -- is needed: N -- arguments"
shift 2

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
port=${PORT:-$(free_port)}

command=(
    env "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    JAX_PLATFORMS=cpu "$python" -m bltjax.train "$@"
    "--coordinator=127.0.0.1:$port" "--num_processes=$number"
)
# Linux ends the processes with this script, even when it is killed with no time to say so.
if setpriv --pdeathsig=KILL true 2>/dev/null; then
    command=(setpriv --pdeathsig=KILL "${command[@]}")
fi

if [ "$dry_run" ]; then
    for ((i = 0; i < number; i++)); do
        printf '%q ' "${command[@]}" "--process_id=$i"
        echo "&"
    done
    echo wait
    exit
fi

prefix() {
    trap '' INT TERM HUP # The last lines come after a signal.
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        printf '[p%s] %s\n' "$1" "$line" >&2
    done
}

pids=()
ended=()
trap 'kill -INT "${pids[@]}" 2>/dev/null || true' INT
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM HUP
pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT

for ((i = 0; i < number; i++)); do
    if [ "$i" -gt 0 ]; then
        mkfifo "$pipes/$i"
        prefix "$i" <"$pipes/$i" &
        exec 3>"$pipes/$i" 4>&3
    else
        exec 3>&1 4>&2
    fi
    # With job control a process has its own group: Ctrl-C reaches it once, through this script.
    set -m
    "${command[@]}" "--process_id=$i" </dev/null >&3 2>&4 3>&- 4>&- &
    pids+=($!)
    set +m
    exec 3>&- 4>&-
done

code=0
running=$number
while [ "$running" -gt 0 ]; do
    sleep 0.1 || true
    for ((i = 0; i < number; i++)); do
        if [ -z "${ended[i]:-}" ] && ! kill -0 "${pids[i]}" 2>/dev/null; then
            ended[i]=1
            running=$((running - 1))
            status=0
            wait "${pids[i]}" || status=$?
            if [ "$status" -ne 0 ] && { [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; }; then
                code=$status
            fi
        fi
    done
done
wait # for the last lines
exit "$code"
