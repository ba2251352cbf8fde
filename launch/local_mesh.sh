#!/usr/bin/env bash
# One process of bltjax.train on simulated CPU devices, in a mesh of any shape. See --help.
set -euo pipefail

usage() {
    cat <<'EOF'
launch/local_mesh.sh [--dry-run] DATA,FSDP,TENSOR -- [arguments of bltjax.train]

Runs bltjax.train in one process on DATA * FSDP * TENSOR simulated CPU devices, to try a mesh
without the machines. Start it in the repository's root:

    launch/local_mesh.sh 1,2,4 -- --config=configs/quickstart.py --workdir=runs/mesh

DATA * FSDP must divide every batch size, and those of the quickstart are small. Up to 8:

    --config.blt_training.batch_size=8 --config.entropy_training.batch_size=8 \
    --config.evaluation.batch_size=8

--dry-run   print the command and do nothing
PYTHON      the interpreter; default: .venv/bin/python of the repository, else python3
XLA_FLAGS   kept; the number of devices is added to it
EOF
}

fail() {
    echo "error: $1" >&2
    exit 2
}

dry_run=
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage && exit ;;
        --dry-run) dry_run=1 && shift ;;
        -*) fail "$1 is not an option: see launch/local_mesh.sh --help" ;;
        *) break ;;
    esac
done
mesh=${1:-}
[[ $mesh =~ ^([1-9][0-9]{0,3}),([1-9][0-9]{0,3}),([1-9][0-9]{0,3})$ ]] ||
    fail "the mesh is '$mesh': give DATA,FSDP,TENSOR, three numbers of devices, for example 2,2,1"
data=${BASH_REMATCH[1]} fsdp=${BASH_REMATCH[2]} tensor=${BASH_REMATCH[3]}
[ "${2:-}" = -- ] || fail "'${2:-}' stands where -- is needed: DATA,FSDP,TENSOR -- arguments"
shift 2

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
command -v "$python" >/dev/null || fail "PYTHON=$python is not there: give an interpreter"
devices=--xla_force_host_platform_device_count=$((data * fsdp * tensor))

command=(
    env "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$devices" JAX_PLATFORMS=cpu
    "$python" -m bltjax.train "$@"
    "--config.mesh.data=$data" "--config.mesh.fsdp=$fsdp" "--config.mesh.tensor=$tensor"
)
if [ "$dry_run" ]; then
    printf '%q' "${command[0]}"
    printf ' %q' "${command[@]:1}"
    echo
else
    exec "${command[@]}"
fi
