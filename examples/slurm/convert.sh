#!/usr/bin/env bash
#SBATCH --job-name=umv2-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umv2-convert-%j.log
# A checkpoint to Hugging Face format on one node, without a GPU; then the export is compared with the checkpoint. `make
# slurm-test` runs it with a tiny model.
#
#   LOAD=runs/227m-slurm/checkpoints EXPORT=exports/227m sbatch \
#       examples/slurm/convert.sh [flags of convert_checkpoint.py to-hf]
#
# LOAD    folder of checkpoints
# EXPORT  folder of the export. If it is there already, it is only compared.
# VERIFY  flags of the comparison (default: --weights-only, for which no model is built)
# RUN     folder of the logs (default: the one that holds LOAD)
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" || exit 2
source examples/slurm/requeue.sh || { echo "submit the job from the repository root, not from $PWD" >&2; exit 2; }

: "${LOAD:?set LOAD to the folder of checkpoints}" "${EXPORT:?set EXPORT to the folder of the export}"
RUN=${RUN:-$(dirname "$LOAD")}

if [[ ! -d $EXPORT ]]; then run_ranks tools/convert_checkpoint.py to-hf --load "$LOAD" --save "$EXPORT" "$@"; fi
# shellcheck disable=SC2086  (VERIFY holds several words)
run_ranks tools/convert_checkpoint.py verify --load "$LOAD" --hf "$EXPORT" ${VERIFY:---weights-only}
