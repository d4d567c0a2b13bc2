"""What an evaluation needs from a model: how likely each token is after those before it, and the likeliest one.

One forward pass over a whole row gives both for every position, because decoders are causal. So nothing here is
generated token by token: an answer is the greedy continuation of its prompt exactly when each of its tokens is the
likeliest after the true ones before it.

Likelihoods are over the tokenizer's own ids. Rows that pad the output matrix are left out, as they are from an export,
so a loss is below training's by what the model still gives to ids that never occur: nothing soon after the first steps.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from umv2_megatron.data.tokenizers import Tokenizer

# Logits that are turned into fp32 at once; bounds the extra memory whatever the vocabulary.
_ENTRIES_AT_ONCE = 1 << 24
# Logits of one forward pass on one rank, 4 GiB of them in fp32.
LOGITS_AT_ONCE = 1 << 30


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
    first_token: int
    """Id of the token that documents began with in training: of the end of a document, or a beginning of its own."""

    def logprobs(self, tokens: torch.Tensor) -> TokenScores:
        """Score rows of token ids, [b, s + 1] int64 on the CPU, the same on every rank; so are the results.

        Rows of different lengths are padded at the end with any id; what is scored there means nothing.
        """
        ...


def rows_at_once(micro_batch_size: int, length: int, vocabulary: int) -> int:
    """Rows of ``length`` tokens that pass a model at once: fewer than asked for where logits would fill memory."""
    return max(1, min(micro_batch_size, LOGITS_AT_ONCE // (length * vocabulary)))


class LogitParts(NamedTuple):
    """Of logits over some ids: the target's (0 where it is not among them), log of the sum of exponentials, the highest
    and its place; [b, s] each, float32 and int64."""

    target: torch.Tensor
    log_sum: torch.Tensor
    highest: torch.Tensor
    argmax: torch.Tensor


def parts_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> LogitParts:
    """Parts of ``logits`` [b, s, n] (n may be 0) for ``targets`` [b, s], which may lie outside of 0 to n - 1.

    Among equal logits the first is the highest. A few rows at a time are turned into fp32.
    """
    width = logits.shape[-1]
    flat, wanted = logits.reshape(targets.numel(), width), targets.reshape(-1)
    target, log_sum, highest = (flat.new_zeros(len(flat), dtype=torch.float32) for _ in range(3))
    best = torch.zeros_like(wanted)
    if width == 0:
        log_sum, highest = log_sum - torch.inf, highest - torch.inf
    step = max(1, _ENTRIES_AT_ONCE // max(1, width))
    for first in range(0, len(flat) if width else 0, step):
        rows = slice(first, first + step)
        part = flat[rows].float()
        inside = (wanted[rows] >= 0) & (wanted[rows] < width)
        chosen = part.gather(1, wanted[rows].clamp(0, width - 1)[:, None])[:, 0]
        target[rows] = torch.where(inside, chosen, 0.0)
        log_sum[rows] = part.logsumexp(-1)
        highest[rows], best[rows] = part.max(-1).values, part.argmax(-1)
    return LogitParts(*(each.view(targets.shape) for each in (target, log_sum, highest, best)))


def scores_of_logits(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> TokenScores:
    """Scores of whole ``logits`` [b, s, at least vocab_size] for ``targets`` [b, s], on the logits' device."""
    parts = parts_of_logits(logits[..., :vocab_size], targets)
    return TokenScores(parts.target - parts.log_sum, parts.argmax)
