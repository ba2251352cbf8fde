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

Output of process 0 is shown as it is, lines of the others begin with [p1], [p2], ... What JAX
prints where process 0 is gone is kept in a file, which is named.
Ctrl-C, TERM and HUP are passed on to all processes: they save the same step and stop. A second
Ctrl-C ends them at once.

Exit code: 0 if all processes are done, 75 if they stopped and saved, otherwise that of the first
process that failed, which is named. Others that do not end then are killed, after a minute at most.

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

is_taken() {
    (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

free_port() {
    # Below 32768, where systems begin to take ports for outgoing connections.
    local port=$((10000 + RANDOM % 22768))
    while is_taken "$port"; do
        port=$((10000 + RANDOM % 22768))
    done
    echo "$port"
}

dry_run=
devices=1
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --devices=*) devices=${1#--devices=} && shift ;;
        -?*) fail "$1 is not an option: see launch/local_processes.sh --help" ;;
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
command -v "$python" >/dev/null || fail "PYTHON=$python is not there: give an interpreter"
port=${PORT:-$(free_port)}
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] && [ "$port" -lt 65536 ] ||
    fail "PORT=$port: give a port, from 1 to 65535, or leave it out"
if is_taken "$port"; then fail "PORT=$port is taken: end what listens there, or leave PORT out"; fi

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
    # From these lines on JAX tells at length that process 0 is gone.
    local line shown=1 log=$pipes/p$1.log noise='^[EFW][0-9]{4} .* (coordination_service|client\.h)'
    while IFS= read -r line || [ -n "$line" ]; do
        if [[ $line =~ $noise ]]; then shown=; fi
        if [[ $line =~ ^(process\ [0-9]+\ of\ |error:) ]]; then shown=1; fi
        if [ "$shown" ]; then
            printf '[p%s] %s\n' "$1" "$line" >&5
        else
            printf '%s\n' "$line" >>"$log"
        fi
    done
}

# Says how a process has ended.
described() {
    if [ "$2" -gt 128 ] && kill -l $(($2 - 128)) >/dev/null 2>&1; then
        echo "process $1 was killed by SIG$(kill -l $(($2 - 128)))"
    else
        echo "process $1 ended with exit code $2"
    fi
}

pids=()
codes=()
# Bash tells of killed processes there, with their commands.
exec 5>&2 2>/dev/null
trap 'kill -INT "${pids[@]}" || true' INT
trap 'kill -TERM "${pids[@]}" || true' TERM HUP
pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT

for ((i = 0; i < number; i++)); do
    if [ "$i" -gt 0 ]; then
        mkfifo "$pipes/$i"
        prefix "$i" <"$pipes/$i" &
        exec 3>"$pipes/$i" 4>&3
    else
        exec 3>&1 4>&5
    fi
    # With job control a process has its own group: Ctrl-C reaches it once, through this script.
    set -m
    "${command[@]}" "--process_id=$i" </dev/null >&3 2>&4 3>&- 4>&- 5>&- &
    pids+=($!)
    set +m
    exec 3>&- 4>&-
done

code=0
first= # the process that failed first
differ= # whether another one ended in another way, later
blamed=
patience=
running=$number
while [ "$running" -gt 0 ]; do
    sleep 0.1 || true
    before=$code
    for ((i = 0; i < number; i++)); do
        if [ "${codes[i]:-}" ]; then
            continue
        elif ! kill -0 "${pids[i]}"; then
            running=$((running - 1))
            status=0
            wait "${pids[i]}" || status=$?
            codes[i]=$status
            if [ "$code" -ne 0 ] && [ "$code" -ne 75 ] && [ "$status" -ne "$code" ]; then
                differ=1
            fi
            # JAX aborts a process that has lost another, perhaps in the same moment.
            if [ "$status" -ne 0 ] && { [ "$code" -eq 0 ] || [ "$code" -eq 75 ] ||
                { [ "$code" -eq 134 ] && [ "$before" -ne 134 ]; }; }; then
                code=$status
                first=$i
            fi
        elif [ "$code" -ne 0 ] && [ "$code" -ne 75 ]; then
            # The others end by themselves: at once where all share a mistake, else in a minute.
            [ "$patience" ] || patience=$((SECONDS + (code == 2 ? 10 : 60)))
            state=$(ps -o stat= -p "${pids[i]}" || true)
            if [ "${state:0:1}" = T ]; then
                blamed="process $i was stopped (by SIGSTOP, say), and is killed now"
            elif [ "$SECONDS" -ge "$patience" ]; then
                echo "process $i does not end: it is killed" >&5
            else
                continue
            fi
            kill -KILL "${pids[i]}" || true
        fi
    done
done
wait # for the last lines
if [ "$code" -ne 0 ] && [ "$code" -ne 75 ] && [ "$differ" ]; then
    kept=
    if ls "$pipes"/*.log >/dev/null; then
        kept="; what JAX said of it in the others is kept in $pipes"
        trap - EXIT
        find "$pipes" -type p -delete || true
    fi
    blamed=${blamed:-"$(described "$first" "$code"), before the others"}
    echo "error: $blamed$kept" >&5
fi
exit "$code"
