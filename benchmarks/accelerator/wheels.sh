#!/usr/bin/env bash
# Wheels for a machine without a network that has Python 3.12, JAX and PyTorch. See --help.
set -euo pipefail

usage() {
    cat <<'USAGE'
benchmarks/accelerator/wheels.sh DIR [JAX]

Collects in DIR what bltjax needs beside JAX, in the versions that go with that version of JAX
(default: 0.11.2), and tokamax, whose kernels attention="mosaic" takes. Copy DIR and the repository
to the machine, and there, in the repository:

    python3 -m pip install --no-index --find-links=DIR -r requirements.txt
    python3 -m pip install --no-index --no-deps DIR/tokamax/*.whl
    export PYTHONPATH=DIR/stub:.
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 python3 benchmarks/accelerator_check.py --out=check

pip takes what the machine has and installs what is missing; add --user where it may not.
USAGE
}

case "${1:-}" in
    "" | --help | -h) usage && exit ;;
esac
directory=$1 jax=${2:-0.11.2}
cd "$(dirname "$0")/../.."

collect() {
    local to=$1 platforms=() name
    shift
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${name}_x86_64")
    done
    python3 -m pip download --quiet --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --dest "$to" "$@"
}

mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
collect "$directory" "jax==$jax" -r requirements.txt
rm -f "$directory"/{jax,jaxlib,numpy,scipy,ml_dtypes}-*.whl # JAX's own, there already

collect "$directory/tokamax" --no-deps tokamax annotated_types einshape immutabledict jaxtyping \
    pydantic typing_inspection qwix wadler_lindig
# Of one release with pydantic, which names it.
core=$(unzip -p "$directory"/tokamax/pydantic-*.whl '*/METADATA' |
    sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p')
collect "$directory/tokamax" --no-deps "pydantic_core==$core"
# tokamax imports 32 MB for benchmarks of its own, and uses nothing of them here.
mkdir -p "$directory/stub/xprof/cli/tools"
for file in __init__ cli/__init__ cli/tools/__init__ cli/tools/get_kernel_stats_tool; do
    : >"$directory/stub/xprof/$file.py"
done
du -sh "$directory"
