#!/usr/bin/env bash
#SBATCH --job-name=umv2-120b
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@5400
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umv2-120b-%j.log
# umv2-2.5b-120b-top256 on 1,024 GPUs of 80 GB under SLURM, 8 to a node. A test makes a dry run of these flags at 1,024
# and 4,096 ranks. Sizes are our choice for the paper's counts, and the layout, the
# learning rate and the batch are a starting point, not the paper's.
#
# To see what every rank would hold, on any machine and in seconds:
#
#   DATA=x TOKENIZER=x LAUNCH=python examples/slurm/pretrain_2.5b_120b.sh --dry-run --dry-run-world-size 1024
#
# Why this layout: 116 billion of the 119 billion parameters are value tables. With 4 pipeline stages of 6 blocks and
# each table sharded over the 8 GPUs of a node (consecutive ranks, so the memory-parallel group stays inside the node),
# a GPU holds 3.6 billion of them. In GB of 80: weights 8.1, main gradients 16.3, optimizer state 1.4 and shuffles 0.1
# by the dry run, and activations and exchange buffers of 7.5 by the planner (10.6 without Transformer Engine). More
# GPUs per table (--memory-parallel-size 16, 64, 256) make the first three smaller, but send more, and from node to
# node. The planner predicts 9.2% MFU for this layout and 16.4% for --memory-parallel-size 64 --memory-parallel-mode row
# without tensor and pipeline parallelism, if the network gives every GPU the 50 GB/s that it assumes: measure both
# before a long run.
#
# A checkpoint of 1.7 TB takes 28 minutes to save where all ranks together write 1 GB/s, so SLURM's signal comes 90
# minutes before the end, and ranks wait for the slowest one for 60 (docs/checkpoints.md, "Large checkpoints and many
# ranks"). A faster file system needs neither.
# It saves before the time limit or a preemption and requeues itself until all iterations are done (requeue.sh). `make
# slurm-test` runs it with a tiny model on CPU; the run itself has not been made on GPUs yet.
#
#   DATA=corpus_text_document TOKENIZER=tokenizer.model sbatch \
#       examples/slurm/pretrain_2.5b_120b.sh [flags of pretrain_umv2.py]
#
# DATA       token files without extension (tools/preprocess_data.py)
# TOKENIZER  their SentencePiece model, of at most 50280 pieces (a larger one: --vocab-size)
# RUN        folder of checkpoints and logs, on a disk that all nodes share (default: runs/120b)
# LOCAL      a directory on every node's own disk, for checkpoints in between, every 100 iterations (default: none)
# What else can be set: requeue.sh.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" || exit 2
source examples/slurm/requeue.sh || { echo "submit the job from the repository root, not from $PWD" >&2; exit 2; }

: "${DATA:?set DATA to the token files, without extension}" "${TOKENIZER:?set TOKENIZER to the SentencePiece model}"
RUN=${RUN:-runs/120b}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # tensor parallelism wants it; see docs/gpu.md

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
    --train-iters 120000
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
if [[ -n ${LOCAL:-} ]]; then
    ARGS+=(--non-persistent-save-interval 100 --non-persistent-local-ckpt-dir "$LOCAL")
fi
run_ranks pretrain_umv2.py "${ARGS[@]}" "$@"
