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
# ranks, and with a larger batch at 4,096. Sizes are our choice for the paper's counts, and the layout, the
# learning rate and the batch are a starting point, not the paper's.
#
# To see what every rank would hold, on any machine and in seconds:
#
#   DATA=x TOKENIZER=x LAUNCH=python examples/slurm/pretrain_2.5b_120b.sh --dry-run --dry-run-world-size 1024
#
# Why this layout: 116 billion of the 119 billion parameters are value tables. Each is shared out by row over 64 GPUs, 8
# nodes, so that a GPU holds 1.8 billion of them and there are 16 replicas. With fewer GPUs per table the replicas'
# gradients and weights are more (3.4 GB per GPU and step each way as it is), with more of them the sums of rows. All
# GPUs are data-parallel. What travels between nodes hides behind computation: --memory-stream and
# --memory-exchange-parts (docs/memory-parallel.md). 4,096 sequences a step, 17 million tokens, are two micro-batches of
# two: with fewer, a step waits for the weights to be gathered and the gradients to be reduced.
#
# The planner predicts for an H100 of 80 GiB (docs/planning.md, "Search"; none of it has run on GPUs), with
# --cross-entropy-fusion-impl te, 31.3% MFU and 46 GiB; 34.4% and 74 GiB in one micro-batch of four with
# --memory-parallel-size 32 and --memory-exchange-parts 1, and 35.0% with twice the sequences: try it once the smaller
# one has shown what activations really take. 1,024 sequences reach 25%. It takes 40 GB/s from every GPU to other nodes
# for granted: measure before a long run.
#
# Gradients are kept and reduced in bfloat16. In float32 (--accumulate-allreduce-grads-in-fp32) the prediction is 30.1%
# and 54 GiB.
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

ARGS=(
    --model-preset umv2-2.5b-120b-top256
    --bf16
    --memory-parallel-size 64
    --memory-parallel-mode row
    --memory-exchange-parts 2
    --memory-stream
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --no-accumulate-allreduce-grads-in-fp32
    --ddp-average-in-collective
    --cross-entropy-loss-fusion
    --data-path "$DATA"
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
    --micro-batch-size 2
    --global-batch-size 4096
    --train-iters 60000
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
