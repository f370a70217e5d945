#!/usr/bin/env bash
# Train on the GPUs of this machine, or on several machines, by torchrun.
#
#   torchrun.sh olmo2_7b data.path=data/text checkpoint.save=runs/7b
#
# On several machines, start it on each with NNODES, NODE_RANK (0, 1, ...) and MASTER_ADDR, the name
# of the first:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=gpu001 torchrun.sh ...
#
# Started again with the same arguments, a run goes on where it was saved. To stop one, send SIGTERM
# to torchrun: the processes save and end.
set -euo pipefail

if (($# == 0)); then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
    exit 2
fi

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
: "${NPROC_PER_NODE:=$((gpus > 0 ? gpus : 1))}" "${NNODES:=1}"

# megatron-core overlaps tensor-parallel communication only with a single hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# After SIGTERM torchrun waits so many seconds before it kills: a checkpoint takes longer than the
# usual 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

if ((NNODES == 1)); then
    meeting=(--standalone)
else
    meeting=(
        --nnodes "$NNODES"
        --node-rank "${NODE_RANK:?which machine this is, from 0}"
        --master-addr "${MASTER_ADDR:?the name of the first machine}"
        --master-port "${MASTER_PORT:-29500}"
    )
fi
exec torchrun "${meeting[@]}" --nproc-per-node "$NPROC_PER_NODE" \
    -m megatron_olmo_bridge train "$@"
