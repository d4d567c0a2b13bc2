#!/usr/bin/env bash
# Speed of umv2-227m-1.2b on one machine with 8 GPUs, its tables sharded over 1, 2, 4 and 8 of them in both modes, beside
# the prediction of tools/plan.py. A test on CPU runs it with a tiny model; it has not been run on GPUs yet.
#
#   examples/bench_8gpu.sh [flags of pretrain_umv2.py]
#   examples/bench_8gpu.sh --dry        a tiny model on 2 CPU ranks: does it run? (The figures mean nothing.)
#
# RUN      folder of logs and results.jsonl (default: runs/bench_8gpu)
# RANKS    GPUs (default: 8)
# SIZES    memory-parallel sizes (default: 1 2 4 8)
# MODES    memory-parallel modes (default: dim row); with size 1 there is none
# MACHINE  machine.json of tools/gpu_check.sh, for the device's rates (default: that of runs/gpu_check, if it exists; else
#          the planner's own)
# PLAN     further flags of tools/plan.py, such as --intra-node-bandwidth 300
# LAUNCH   command that starts the ranks
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
if [[ -d .venv ]]; then export PATH="$PWD/.venv/bin:$PATH"; fi

MODEL=(--model-preset umv2-227m-1.2b --micro-batch-size 4 --global-batch-size 64 --train-iters 20 --num-workers 2)
if [[ ${1:-} == --dry ]]; then
    shift
    RANKS=${RANKS:-2}
    SIZES=${SIZES:-1 2}
    MODEL=(--model-preset umv2-tiny --num-layers 2 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1
        --global-batch-size 4 --train-iters 3 --num-workers 0)
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
fi
RUN=${RUN:-runs/bench_8gpu}
RANKS=${RANKS:-8}
SIZES=${SIZES:-1 2 4 8}
MODES=${MODES:-dim row}
MACHINE=${MACHINE:-runs/gpu_check/machine.json}
LAUNCH=${LAUNCH:-torchrun --standalone --nproc-per-node $RANKS}

ARGS=(
    "${MODEL[@]}"
    --bf16
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --mock-data
    --tokenizer-type NullTokenizer
    --lr 1e-4
    --eval-iters 0
    --log-interval 1
    --log-throughput
)
DEVICE=()
if [[ -f $MACHINE ]]; then DEVICE=(--machine "$MACHINE"); fi
mkdir -p "$RUN"
rm -f "$RUN/results.jsonl"
code=0

measure() {  # name, then the flags of the layout
    local name=$1 log
    log="$RUN/${name// /_}.log"
    shift
    if ! $LAUNCH pretrain_umv2.py "${ARGS[@]}" "$@" >"$log" 2>&1; then
        echo "$name: the run failed, see $log"
        code=1
        return
    fi
    # shellcheck disable=SC2086  (PLAN holds several words)
    python benchmarks/predicted.py --log "$log" --name "$name" --world-size "$RANKS" --json "$RUN/results.jsonl" \
        "${DEVICE[@]}" "${ARGS[@]}" "$@" ${PLAN:-} || code=1
}

python benchmarks/predicted.py --header
for size in $SIZES; do
    if ((size == 1)); then
        measure "M 1" "$@"
        continue
    fi
    for mode in $MODES; do
        measure "M $size $mode" --memory-parallel-size "$size" --memory-parallel-mode "$mode" "$@"
    done
done
exit "$code"
