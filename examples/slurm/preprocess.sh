#!/usr/bin/env bash
#SBATCH --job-name=umv2-preprocess
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umv2-preprocess-%j.log
# Tokenizes a corpus on several hosts: one rank on each, with a worker for each CPU. All hosts must see the files. Where it
# is interrupted it is requeued, and goes on with the parts that are missing (docs/data.md). `make slurm-test` runs it with
# a small corpus.
#
#   INPUT='/data/corpus/*.jsonl.zst' TOKENIZER=tokenizer.model OUTPUT=/data/corpus sbatch \
#       examples/slurm/preprocess.sh [flags of preprocess_data.py]
#
# INPUT      the files, or a glob in quotes
# TOKENIZER  the SentencePiece model
# OUTPUT     path of the token files, without _text_document
# RUN        folder of the logs, on a disk that all nodes share (default: the one of OUTPUT)
# What else can be set: requeue.sh.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" || exit 2
source examples/slurm/requeue.sh || { echo "submit the job from the repository root, not from $PWD" >&2; exit 2; }

: "${INPUT:?set INPUT to the files, or to a glob in quotes}" "${TOKENIZER:?set TOKENIZER to the SentencePiece model}"
: "${OUTPUT:?set OUTPUT to the path of the token files, without _text_document}"
RUN=${RUN:-$(dirname "$OUTPUT")}
SRUN_OPTIONS=(--kill-on-bad-exit=0 --wait=0)  # ranks that are done leave rank 0 to join the parts, however long it takes

ARGS=(
    --input "$INPUT"
    --output-prefix "$OUTPUT"
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
    --append-eod
    --workers "${SLURM_CPUS_PER_TASK:-1}"
)
run_ranks tools/preprocess_data.py "${ARGS[@]}" "$@"
