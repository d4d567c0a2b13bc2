#!/usr/bin/env bash
#SBATCH --job-name=umv2-7b-41b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umv2-7b-41b-%j.log
# A 7B-class model (6.7B activated of 41B parameters) on 8 nodes with 8 GPUs of 80 GB each, under SLURM. No such preset
# exists: sizes are our choice, those of umv2-2.5b-25b with more layers, width and keys; memory has 16% of the blocks'
# FLOPs. Learning rate, batch and length are a starting point. 34 billion parameters are value tables, and the 8 GPUs of
# a node share each of them (consecutive ranks, so that rows do not travel between nodes). The planner counts 71 GiB on
# a GPU.
# It saves before the time limit or a preemption and requeues itself until all iterations are done (requeue.sh). `make
# slurm-test` runs it with a tiny model on CPU; the run itself has not been made on GPUs yet.
#
#   DATA=corpus_text_document TOKENIZER=tokenizer.model sbatch \
#       examples/slurm/pretrain_7b_41b.sh [flags of pretrain_umv2.py]
#
# DATA       token files without extension (tools/preprocess_data.py)
# TOKENIZER  their SentencePiece model, of at most 50280 pieces (a larger one: --vocab-size)
# RUN        folder of checkpoints and logs, on a disk that all nodes share (default: runs/7b-41b)
# LOCAL      a directory on every node's own disk, for checkpoints in between, every 100 iterations (default: none)
# What else can be set: requeue.sh.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" || exit 2
source examples/slurm/requeue.sh || { echo "submit the job from the repository root, not from $PWD" >&2; exit 2; }

: "${DATA:?set DATA to the token files, without extension}" "${TOKENIZER:?set TOKENIZER to the SentencePiece model}"
RUN=${RUN:-runs/7b-41b}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # tensor parallelism wants it; see docs/gpu.md

ARGS=(
    --model-preset umv2-2.5b-25b
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 10240
    --num-attention-heads 32
    --memory-num-keys 1024
    --memory-key-dim 1536
    --bf16
    --tensor-model-parallel-size 2
    --sequence-parallel
    --memory-parallel-size 8
    --memory-parallel-mode row
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --data-path "$DATA"
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
    --micro-batch-size 1
    --global-batch-size 1024
    --train-iters 100000
    --lr 3e-4
    --lr-warmup-iters 2000
    --lr-decay-style cosine
    --weight-decay 0.1
    --clip-grad 1.0
    --eval-interval 1000
    --eval-iters 20
    --log-interval 10
    --memory-log-interval 1000
    --save "$RUN/checkpoints"
    --save-interval 1000
    --save-retain-interval 10000
    --distributed-timeout-minutes 30
    --tensorboard-dir "$RUN/tensorboard"
)
if [[ -n ${LOCAL:-} ]]; then
    ARGS+=(--non-persistent-save-interval 100 --non-persistent-local-ckpt-dir "$LOCAL")
fi
run_ranks pretrain_umv2.py "${ARGS[@]}" "$@"
