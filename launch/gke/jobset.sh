#!/usr/bin/env bash
# bltjax.train on TPU slices of a GKE cluster, as a JobSet. See --help.
set -euo pipefail

usage() {
    cat <<'EOF'
launch/gke/jobset.sh [--dry-run] -- [arguments of bltjax.train]

Makes a JobSet with one pod for each host of each TPU slice and gives it to kubectl. The cluster
needs the JobSet controller and a node pool for each slice, whose service account may use the bucket.

    export NAME=blt IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/bltjax
    export ACCELERATOR=tpu-v6e-slice TOPOLOGY=8x8
    launch/gke/jobset.sh -- --config=configs/blt_1b.py --workdir=gs://BUCKET/blt \
        --config.data.root=gs://BUCKET/corpus --config.mesh.fsdp=8

When the nodes are taken away, all processes save the same step and exit with code 75. Any code but
0 restarts the JobSet, at most MAX_RESTARTS times, and training goes on where it was saved. Codes 2
(the command is at fault) and 3 (the loss became NaN) end it: a restart would end the same way.

--dry-run   print the command with its YAML and do nothing

Settings, from the environment:
  NAME             of the JobSet
  IMAGE            made from launch/Dockerfile with EXTRA=tpu
  CLAIM            instead of a bucket: a PersistentVolumeClaim that many nodes may write; it is
                   /runs in the pods, for --workdir=/runs/...
  ACCELERATOR      tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x
  TOPOLOGY         chips of a slice, as its node pool has it: 8x8, 4x4x8, ...
  CHIPS_PER_HOST   as the node pool's machines have them; default: 4, or all of a smaller slice
  SLICES           how many slices train together; default: 1
  MAX_RESTARTS     default: 100
  SPOT=1           on spot nodes
  NAMESPACE        default: that of kubectl's context
EOF
}

fail() {
    echo "error: $1" >&2
    exit 2
}

# A YAML string of anything in one line. Kubernetes would replace $(NAME); $$( stands for $(.
quoted() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    printf '"%s"' "${text//\$(/\$\$(}"
}

dry_run=
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage && exit ;;
        --dry-run) dry_run=1 && shift ;;
        *) break ;;
    esac
done
[ "${1:-}" = -- ] && [ $# -gt 1 ] ||
    fail "arguments of bltjax.train are needed: launch/gke/jobset.sh -- --config=... --workdir=..."
shift
for argument in "$@"; do
    [[ $argument != *[[:cntrl:]]* ]] || fail "an argument has a line break or control character"
done
for setting in NAME IMAGE ACCELERATOR TOPOLOGY; do
    [ "${!setting:-}" ] || fail "$setting is not set: export it, see launch/gke/jobset.sh --help"
done
# Kubernetes appends to the name, and takes 63 characters.
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "NAME=$NAME: give at most 40 lower-case letters, digits and hyphens, a letter first"
[[ ${SPOT:-} =~ ^[01]?$ ]] || fail "SPOT=$SPOT: give 1 for spot nodes, or leave it out"
libtpu_flags=${LIBTPU_INIT_ARGS---xla_tpu_enable_async_collective_fusion=true \
--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_enable_async_collective_fusion_multiple_steps=true \
--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true}
# Process 0 alone writes compiled programs: the others find them where the run is.
place=${CLAIM:+/runs}
for argument in "$@"; do
    [[ ! $argument =~ ^--?workdir=(gs://[^/]+) ]] || place=${BASH_REMATCH[1]}
done
[ "$place" ] || fail "nothing would be kept: give --workdir=gs://BUCKET/RUN, or export CLAIM for \
--workdir=/runs/RUN"
compiled=${JAX_COMPILATION_CACHE_DIR-$place/compiled}
slices=${SLICES:-1}
if [ "$slices" != 1 ] && [ -z "${LIBTPU_INIT_ARGS+set}" ]; then # gradients between slices
    libtpu_flags+=" --xla_tpu_enable_data_parallel_all_reduce_opt=true"
    libtpu_flags+=" --xla_tpu_data_parallel_opt_different_sized_ops=true"
fi
restarts=${MAX_RESTARTS:-100}
[[ $slices =~ ^[1-9][0-9]{0,3}$ ]] || fail "SLICES=$slices: give a number of slices"
[[ $restarts =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "MAX_RESTARTS=$restarts: give a number of restarts"

dimensions=3 example=4x4x8
case "$ACCELERATOR" in
    tpu-v5-lite-podslice | tpu-v6e-slice) dimensions=2 example=8x8 ;;
    tpu-v4-podslice | tpu-v5p-slice | tpu7x) ;;
    *) fail "ACCELERATOR=$ACCELERATOR is not known: see launch/gke/jobset.sh --help" ;;
esac
[[ $TOPOLOGY =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){$((dimensions - 1))}$ ]] ||
    fail "TOPOLOGY=$TOPOLOGY: $ACCELERATOR takes $dimensions dimensions, from 1, as in $example"
for size in ${TOPOLOGY//x/ }; do
    [ "$size" -le 2 ] || [ $((size % 4)) -eq 0 ] ||
        fail "TOPOLOGY=$TOPOLOGY: the sizes of a slice are 1, 2 or multiples of 4, as in $example"
done
chips=$((${TOPOLOGY//x/*}))
chips_per_host=${CHIPS_PER_HOST:-$((chips < 4 ? chips : 4))}
divisors=
for number in 1 2 4 8; do
    [ $((chips % number)) -ne 0 ] || divisors+=${divisors:+, }$number
done
[[ $chips_per_host =~ ^[1248]$ ]] && [ $((chips % chips_per_host)) -eq 0 ] ||
    fail "CHIPS_PER_HOST=$chips_per_host does not divide the $chips chips of $TOPOLOGY into hosts: \
give one of $divisors"
hosts=$((chips / chips_per_host))

yaml() {
    cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    # A slice never takes hosts from two node pools, nor two slices from one.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: hopeless
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [2, 3]
          template:
            spec:
              restartPolicy: Never
              # Time to save.
              terminationGracePeriodSeconds: 120
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
EOF
    if [ "${SPOT:-}" = 1 ]; then
        cat <<EOF
                cloud.google.com/gke-spot: "true"
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule
EOF
    fi
    cat <<EOF
              containers:
                - name: train
                  image: $(quoted "$IMAGE")
                  args:
                    - bltjax.train
                    - --config.data.cache=/cache
                    - --config.data.cache_bytes=40000000000
EOF
    for argument in "$@"; do
        echo "                    - $(quoted "$argument")"
    done
    cat <<EOF
                  # Collectives beside the computation, as MaxText sets them for v5e to v6e: by the
                  # compiled program v6e gathers weights so, and v5e does by itself. Not measured.
                  env:
                    - name: LIBTPU_INIT_ARGS
                      value: $(quoted "$libtpu_flags")
                    - name: JAX_COMPILATION_CACHE_DIR
                      value: $(quoted "$compiled")
                  # The TPU's devices belong to root, and its driver locks much memory.
                  securityContext:
                    privileged: true
                    runAsUser: 0
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    limits:
                      google.com/tpu: $chips_per_host
                  volumeMounts:
                    - name: cache
                      mountPath: /cache
                    - name: shared-memory
                      mountPath: /dev/shm
EOF
    if [ "${CLAIM:-}" ]; then
        cat <<EOF
                    - name: runs
                      mountPath: /runs
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: $(quoted "$CLAIM")
EOF
    else
        echo "              volumes:"
    fi
    cat <<EOF
                # Copies of records, on the disk of the node.
                - name: cache
                  emptyDir: {}
                # Processes that prepare batches hand them over in it; containers have 64 MB.
                - name: shared-memory
                  emptyDir:
                    medium: Memory
EOF
}

kubectl=(kubectl)
if [ "${NAMESPACE:-}" ]; then kubectl+=("--namespace=$NAMESPACE"); fi
kubectl+=(apply "--filename=-")
if [ "$dry_run" ]; then
    printf '%q' "${kubectl[0]}"
    printf ' %q' "${kubectl[@]:1}"
    echo " <<'EOF'"
    yaml "$@"
    echo EOF
else
    command -v kubectl >/dev/null || fail "kubectl is not installed: install it, or use --dry-run"
    yaml "$@" | "${kubectl[@]}"
fi
