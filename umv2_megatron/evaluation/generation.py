"""Text from a trained model, one token at a time: greedy, or sampled with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 takes the likeliest; ``top_k`` 0 and ``top_p`` 1 keep all."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature}; expected 0 or more")
        if self.top_k < 0:
            raise ValueError(f"--top-k is {self.top_k}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}; expected a number above 0 and at most 1")


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One token id per row of ``logits`` [b, vocabulary]; int64 [b]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / sampling.temperature
    if sampling.top_k:
        kth = scaled.topk(min(sampling.top_k, scaled.shape[-1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)
    probability = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probability.sort(-1, descending=True)
        # a token stays while the mass before it is below top_p, so the likeliest always stays
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
        probability = torch.zeros_like(probability).scatter(-1, order, ordered)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)


def generate(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    prompt: list[int],
    max_new_tokens: int,
    context: int,
    vocab_size: int,
    end: int | None,
    sampling: Sampling,
    seed: int,
) -> Iterator[int]:
    """Yield the token ids that follow ``prompt``, at most ``max_new_tokens``, until ``end``.

    Args:
        logits_of: logits [1, at least vocab_size] of the token after tokens [1, s] (``restore.next_token_logits``).
        context: tokens the model takes; older ones drop out.
        vocab_size: ids from here on are padding and never drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits = logits_of(torch.tensor([tokens[-context:]]))[:, :vocab_size].cpu()
        token = int(draw(logits, sampling, generator))
        if token == end:
            return
        tokens.append(token)
        yield token
