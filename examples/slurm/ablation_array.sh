#!/usr/bin/env bash
#SBATCH --job-name=umv2-ablation
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umv2-ablation-%A_%a.log
# The trials of a plan of tools/ablate.py (every run with every seed) as an array job: each trial on a node of its own,
# as many at a time as the cluster has room for. A task that is interrupted is requeued and goes on; a finished trial is
# left alone. `make slurm-test` runs it with a tiny plan on CPU; it has not been run on GPUs yet.
#
#   PLAN=examples/ablations/second-moment.yaml sbatch --array=0-3 \
#       examples/slurm/ablation_array.sh [flags of ablate.py]
#   python tools/ablate.py examples/ablations/second-moment.yaml --output runs/second-moment --report-only  # in the end
#
# --array  0 to the number of trials less one (%4 behind it: at most 4 at a time)
# PLAN     the plan. To use all GPUs of a node it says
#          launcher: torchrun --standalone --nproc-per-node 8 --shutdown-timeout 240
# RUN      folder of the trials and logs, on a disk that all nodes share (default: runs/ and the plan's name)
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" || exit 2
source examples/slurm/requeue.sh || { echo "submit the job from the repository root, not from $PWD" >&2; exit 2; }

: "${PLAN:?set PLAN to the plan, such as examples/ablations/second-moment.yaml}"
RUN=${RUN:-runs/$(basename "$PLAN" .yaml)}

run_ranks tools/ablate.py "$PLAN" --output "$RUN" --trial "${SLURM_ARRAY_TASK_ID:?submit it with --array}" "$@"
