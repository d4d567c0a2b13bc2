#!/usr/bin/env bash
#SBATCH --job-name=preprocess
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --output=preprocess-%j.log
# Tokenizes a corpus on several hosts: one rank on each, with a worker for each CPU.
#
#   INPUT='/data/corpus/*.jsonl.zst' TOKENIZER=tokenizer.model OUTPUT=/data/corpus \
#       sbatch examples/slurm/preprocess.sh [flags of preprocess_data.py]
#
# Submit it from the repository root. All hosts must see the files. A job that reached its time limit, or lost a host, is
# submitted again as it was: it goes on with the parts that are missing (docs/data.md).
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
if [[ -d .venv ]]; then export PATH="$PWD/.venv/bin:$PATH"; fi

: "${INPUT:?set INPUT to the files, or to a glob in quotes}" "${TOKENIZER:?set TOKENIZER to the SentencePiece model}"
: "${OUTPUT:?set OUTPUT to the path of the token files, without _text_document}"

${LAUNCH:-srun --kill-on-bad-exit=1} python tools/preprocess_data.py \
    --input "$INPUT" \
    --output-prefix "$OUTPUT" \
    --tokenizer-type SentencePieceTokenizer \
    --tokenizer-model "$TOKENIZER" \
    --append-eod \
    --workers "${SLURM_CPUS_PER_TASK:-1}" \
    "$@"
