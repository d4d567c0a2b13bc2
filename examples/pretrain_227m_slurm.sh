#!/usr/bin/env bash
#SBATCH --job-name=umv2-227m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umv2-227m-%j.log
# umv2-227m-1.2b under SLURM: saves before the time limit or a preemption, and requeues itself until all
# iterations are done. A test on CPU checks the flags; the run itself has not been made on GPUs yet.
#
#   DATA=corpus_text_document TOKENIZER=tokenizer.model sbatch examples/pretrain_227m_slurm.sh [flags of pretrain_umv2.py]
#
# Submit it from the repository root, with RUN on a disk that all nodes share. How it works:
# - SLURM sends USR1 to this shell 900 s before the end. The shell forwards it to the ranks, which save and exit with code 0.
# - USR1 would kill torchrun, so torchrun ignores it; the ranks set their own handler.
# - A batch script that ends counts as completed and would not run again, so this one calls `scontrol requeue` itself.
# - The exit code is 0 for both "finished" and "saved and stopped", so the number of iterations decides.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
if [[ -d .venv ]]; then export PATH="$PWD/.venv/bin:$PATH"; fi

: "${DATA:?set DATA to the token files, without extension}" "${TOKENIZER:?set TOKENIZER to the SentencePiece model}"
RUN=${RUN:-runs/227m-slurm}
TRAIN_ITERS=${TRAIN_ITERS:-50000}
RANKS_PER_NODE=${RANKS_PER_NODE:-8}

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
    --train-iters "$TRAIN_ITERS"
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
    --nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS_PER_NODE" --shutdown-timeout 600 \
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
