"""How well a model does that knows nothing but how often each token occurs.

The unigram entropy of a corpus, -sum_t p(t) ln p(t) nats per token with p the frequencies in that very corpus, is the
loss of the best model without context. A language model that has learned anything about context lies below it.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np

from umv2_megatron.data.indexing import read_index, read_meta, read_tokens

_BLOCK = 1 << 22


class UnigramEntropy(NamedTuple):
    """Entropy in nats per token, and bytes of UTF-8 text per token (None when the corpus has no sidecar).

    ``nats_per_token / ln 2 / bytes_per_token`` is the entropy in bits per byte, comparable between tokenizers.
    """

    nats_per_token: float
    bytes_per_token: Optional[float]


def unigram_entropy(prefix: str) -> UnigramEntropy:
    """Unigram entropy of the tokens of ``prefix.bin``, end-of-document tokens included.

    Raises ``ValueError`` naming the file when the corpus is missing or damaged.
    """
    tokens = read_tokens(prefix, read_index(prefix))
    counts = np.zeros(0, dtype=np.int64)
    for first in range(0, len(tokens), _BLOCK):
        block = np.bincount(tokens[first : first + _BLOCK], minlength=len(counts))
        block[: len(counts)] += counts
        counts = block
    shares = counts[counts > 0] / len(tokens)
    return UnigramEntropy(float(-(shares * np.log(shares)).sum()), bytes_per_token(prefix))


def bytes_per_token(prefix: str) -> Optional[float]:
    """Bytes of UTF-8 text per token of ``prefix.bin``, end-of-document tokens included; None without a sidecar.

    It reads the index and the sidecar alone. Raises ``ValueError`` as ``unigram_entropy`` does.
    """
    meta = read_meta(prefix)
    text_bytes = meta.get("text_bytes") if meta is not None else None
    return text_bytes / int(read_index(prefix).lengths.sum(dtype=np.int64)) if text_bytes else None
