#!/usr/bin/env bash
# umv2-8m-first on two CPU ranks: 1000 iterations of 2048 tokens. Run it again after an interruption and it continues.
#
#   examples/pretrain_8m_cpu.sh [flags of pretrain_umv2.py]
#
# RUN       directory of corpus, tokenizer and checkpoints (default: runs/8m)
# DATA      token files without extension, TOKENIZER their SentencePiece model (default: created from the demo corpus)
# LAUNCH    command that starts the ranks
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -d .venv ]]; then export PATH="$PWD/.venv/bin:$PATH"; fi

RUN=${RUN:-runs/8m}
DATA=${DATA:-$RUN/corpus_text_document}
TOKENIZER=${TOKENIZER:-$RUN/tokenizer.model}
LAUNCH=${LAUNCH:-torchrun --standalone --nproc-per-node 2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # ranks times threads should not exceed the cores

if [[ ! -f $DATA.idx ]]; then
    mkdir -p "$RUN"
    python tools/demo_corpus.py --output "$RUN/corpus.jsonl"
    python tools/train_tokenizer.py --input "$RUN/corpus.jsonl" --vocab-size 4096 --output-prefix "$RUN/tokenizer"
    python tools/preprocess_data.py --input "$RUN/corpus.jsonl" --output-prefix "$RUN/corpus" --append-eod \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER" --workers 2
fi

ARGS=(
    --config examples/umv2_8m.yaml
    --data-path "$DATA"
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
    --save "$RUN/checkpoints"
    --tensorboard-dir "$RUN/tensorboard"
)
$LAUNCH pretrain_umv2.py "${ARGS[@]}" "$@"
