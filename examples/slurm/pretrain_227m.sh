#!/usr/bin/env bash
#SBATCH --job-name=umv2-227m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umv2-227m-%j.log
# umv2-227m-1.2b on 16 GPUs under SLURM. Sizes are those of the paper; learning rate, batch and length are a starting
# point, not the paper's.
# It saves before the time limit or a preemption and requeues itself until all iterations are done (requeue.sh). `make
# slurm-test` runs it with a tiny model on CPU; the run itself has not been made on GPUs yet.
#
#   DATA=corpus_text_document TOKENIZER=tokenizer.model sbatch \
#       examples/slurm/pretrain_227m.sh [flags of pretrain_umv2.py]
#
# DATA       token files without extension (tools/preprocess_data.py)
# TOKENIZER  their SentencePiece model, of at most 50280 pieces (a larger one: --vocab-size)
# RUN        folder of checkpoints and logs, on a disk that all nodes share (default: runs/227m-slurm)
# What else can be set: requeue.sh.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" || exit 2
source examples/slurm/requeue.sh || { echo "submit the job from the repository root, not from $PWD" >&2; exit 2; }

: "${DATA:?set DATA to the token files, without extension}" "${TOKENIZER:?set TOKENIZER to the SentencePiece model}"
RUN=${RUN:-runs/227m-slurm}

ARGS=(
    --model-preset umv2-227m-1.2b
    --bf16
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --data-path "$DATA"
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
    --micro-batch-size 4
    --global-batch-size 512
    --train-iters 50000
    --lr 4e-4
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
    --tensorboard-dir "$RUN/tensorboard"
)
run_ranks pretrain_umv2.py "${ARGS[@]}" "$@"
