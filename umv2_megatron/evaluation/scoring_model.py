"""What an evaluation needs from a model: how likely each token is after those before it, and the likeliest one.

One forward pass over a whole row gives both for every position, because decoders are causal. So nothing here is
generated token by token: an answer is the greedy continuation of its prompt exactly when each of its tokens is the
likeliest after the true ones before it.

Likelihoods are those of the model's whole output, rows that pad the vocabulary included: this is the distribution that
training's loss is taken from, and padding learns to be unlikely within a few steps.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from umv2_megatron.training.tokenizers import Tokenizer

# Logits that are turned into fp32 at once; bounds the extra memory whatever the vocabulary.
_ENTRIES_AT_ONCE = 1 << 24


class TokenScores(NamedTuple):
    """Of rows of tokens [b, s + 1], for each target ``tokens[:, j + 1]`` after ``tokens[:, : j + 1]``:

    log_likelihood: nats, [b, s] float32 on the CPU; argmax: id of the likeliest token there, [b, s] int64 on the CPU.
    """

    log_likelihood: torch.Tensor
    argmax: torch.Tensor


class ScoringModel(Protocol):
    """A model with its tokenizer. Several ranks may hold it together: then all of them call ``logprobs`` alike."""

    tokenizer: Tokenizer
    context: int
    """Tokens of the context that the model was trained with."""
    longest_context: int | None
    """Tokens beyond which it cannot read (learned positions end there); None where nothing stops it."""

    def logprobs(self, tokens: torch.Tensor) -> TokenScores:
        """Score rows of token ids, [b, s + 1] int64 on the CPU, the same on every rank; so are the results.

        Rows of different lengths are padded at the end with any id; what is scored there means nothing.
        """
        ...


def scores_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Log-likelihoods and argmax of whole ``logits`` [b, s, V] for ``targets`` [b, s]; results on the logits' device.

    Among equal logits the lowest id is the likeliest.
    """
    flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1, 1)
    likelihood = torch.empty(len(flat), dtype=torch.float32, device=flat.device)
    best = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    step = max(1, _ENTRIES_AT_ONCE // flat.shape[-1])
    for first in range(0, len(flat), step):
        part = flat[first : first + step].float()
        chosen = part.gather(1, wanted[first : first + step])[:, 0]
        likelihood[first : first + step] = chosen - part.logsumexp(-1)
        best[first : first + step] = part.argmax(-1)
    return TokenScores(likelihood.view(targets.shape), best.view(targets.shape))
