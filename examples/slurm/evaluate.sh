#!/usr/bin/env bash
#SBATCH --job-name=umv2-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umv2-evaluate-%j.log
# Evaluates a checkpoint on the 8 GPUs of one node, in the layout that the flags say (default: each GPU holds the model
# and takes a part of the questions). An evaluation that is interrupted starts again. `make slurm-test` runs it with a
# tiny model on CPU; it has not been run on GPUs yet.
#
#   LOAD=runs/227m-slurm/checkpoints sbatch examples/slurm/evaluate.sh --tasks all --data data/valid_text_document
#   LOAD=runs/7b-41b/checkpoints sbatch examples/slurm/evaluate.sh --tasks all --memory-parallel-size 8
#
# LOAD    folder of checkpoints
# OUTPUT  the report (default: evaluation.json in RUN)
# RUN     folder of the logs (default: the one that holds LOAD)
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" || exit 2
source examples/slurm/requeue.sh || { echo "submit the job from the repository root, not from $PWD" >&2; exit 2; }

: "${LOAD:?set LOAD to the folder of checkpoints}"
RUN=${RUN:-$(dirname "$LOAD")}

run_ranks tools/evaluate.py --load "$LOAD" --output "${OUTPUT:-$RUN/evaluation.json}" "$@"
