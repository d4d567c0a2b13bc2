#!/usr/bin/env bash
#SBATCH --job-name=umv2-120b
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@5400
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umv2-120b-%j.log
# umv2-2.5b-120b-top256 on 1,024 GPUs of 80 GB under SLURM, 8 to a node. A test makes a dry run of these flags at 1,024
# and 4,096 ranks; the run itself has not been made. Sizes are our choice for the paper's counts, and the layout, the
# learning rate and the batch are a starting point, not the paper's.
#
#   DATA=corpus_text_document TOKENIZER=tokenizer.model sbatch examples/pretrain_umv2_2.5b_120b.sh [flags of pretrain_umv2.py]
#
# To see what every rank would hold, on any machine and in seconds:
#
#   DATA=x TOKENIZER=x LAUNCH=python examples/pretrain_umv2_2.5b_120b.sh --dry-run --dry-run-world-size 1024
#
# Why this layout: 116 billion of the 119 billion parameters are value tables. With 4 pipeline stages of 6 blocks and each
# table sharded over the 8 GPUs of a node (consecutive ranks, so the memory-parallel group stays inside the node), a GPU
# holds 3.6 billion of them. In GB of 80: weights 8.1, main gradients 16.3, optimizer state 1.4 and shuffles 0.1 by the dry run, and
# activations and exchange buffers of 7.5 by the planner (10.6 without Transformer Engine). More GPUs per table
# (--memory-parallel-size 16, 64, 256) make the first three smaller, but send more, and from node to node. The planner
# predicts 9.2% MFU for this layout and 16.4% for --memory-parallel-size 64 --memory-parallel-mode row without tensor and
# pipeline parallelism, if the network gives every GPU the 50 GB/s that it assumes: measure both before a long run.
#
# Submit it from the repository root, with RUN on a disk that all nodes share. How it stops and continues is explained in
# examples/pretrain_227m_slurm.sh; saving a checkpoint of 1.7 TB takes longer, so SLURM's signal comes 90 minutes before
# the end: hashing alone takes 21 of them at 1.3 GB/s (docs/checkpoints.md, "Known limit").
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
if [[ -d .venv ]]; then export PATH="$PWD/.venv/bin:$PATH"; fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # tensor parallelism wants it; see docs/gpu.md

: "${DATA:?set DATA to the token files, without extension}" "${TOKENIZER:?set TOKENIZER to the SentencePiece model}"
RUN=${RUN:-runs/120b}
TRAIN_ITERS=${TRAIN_ITERS:-120000}
RANKS_PER_NODE=${RANKS_PER_NODE:-8}

ARGS=(
    --model-preset umv2-2.5b-120b-top256
    --bf16
    --tensor-model-parallel-size 2
    --sequence-parallel
    --pipeline-model-parallel-size 4
    --memory-parallel-size 8
    --memory-parallel-mode dim
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --data-path "$DATA"
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
    --micro-batch-size 1
    --global-batch-size 2048
    --train-iters "$TRAIN_ITERS"
    --lr 3e-4
    --lr-warmup-iters 2000
    --lr-decay-style cosine
    --weight-decay 0.1
    --clip-grad 1.0
    --eval-interval 1000
    --eval-iters 10
    --log-interval 10
    --memory-log-interval 1000
    --save "$RUN/checkpoints"
    --save-interval 1000
    --save-retain-interval 20000
    --distributed-timeout-minutes 60
    --tensorboard-dir "$RUN/tensorboard"
)

if [[ -n ${LAUNCH:-} ]]; then
    $LAUNCH pretrain_umv2.py "${ARGS[@]}" "$@"
    exit
fi

stopping=0
pass_on() {  # to the ranks of all steps, not to this shell
    stopping=1
    scancel --signal=USR1 "$SLURM_JOB_ID"
}
trap pass_on USR1 TERM

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec torchrun "$@"' torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS_PER_NODE" --shutdown-timeout 3600 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:${MASTER_PORT:-29500}" \
    pretrain_umv2.py "${ARGS[@]}" "$@" &
step=$!
code=0
while kill -0 "$step" 2>/dev/null; do  # a trapped signal ends `wait` early
    wait "$step"
    code=$?
done

trap '' USR1 TERM  # from here on a second signal must not end this shell before it has requeued the job
finished=$(cat "$RUN/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0)
if ((stopping && finished < TRAIN_ITERS)); then
    echo "saved at iteration $finished of $TRAIN_ITERS; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
