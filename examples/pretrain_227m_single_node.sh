#!/usr/bin/env bash
# umv2-227m-1.2b on one machine with 8 GPUs: bf16, data parallel, distributed optimizer, communication overlapped.
# A test on CPU checks the flags; the run itself has not been made on GPUs yet. Sizes are those of the paper;
# learning rate, batch and length are a starting point, not the paper's.
#
#   DATA=corpus_text_document TOKENIZER=tokenizer.model examples/pretrain_227m_single_node.sh [flags of pretrain_umv2.py]
#
# DATA      token files without extension (tools/preprocess_data.py)
# TOKENIZER their SentencePiece model, of at most 50280 pieces (a larger one: --vocab-size)
# RUN       directory of the checkpoints (default: runs/227m)
# LAUNCH    command that starts the ranks
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -d .venv ]]; then export PATH="$PWD/.venv/bin:$PATH"; fi

: "${DATA:?set DATA to the token files, without extension}" "${TOKENIZER:?set TOKENIZER to the SentencePiece model}"
RUN=${RUN:-runs/227m}
# 10 minutes between SIGTERM and SIGKILL, so that a last checkpoint can be written; torchrun's own default is 30 s
LAUNCH=${LAUNCH:-torchrun --standalone --nproc-per-node 8 --shutdown-timeout 600}

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
$LAUNCH pretrain_umv2.py "${ARGS[@]}" "$@"
