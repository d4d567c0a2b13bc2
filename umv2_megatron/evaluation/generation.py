"""Text from a trained model, one token at a time: greedy, or sampled with temperature, top-k and top-p.

``CachedMegatronModel`` and ``CachedTransformersModel`` give the logits of the next token and keep keys and values of
the tokens they have seen, so that a further token costs a forward pass over one token. ``generate`` draws from the
logits of either, with the same numbers for the same seed. ``TextStream`` turns ids into text that can be printed as
they come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from umv2_megatron.parallel import cpu_platform


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 takes the likeliest; ``top_k`` 0 and ``top_p`` 1 keep all."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature is {self.temperature}; expected a number of 0 or more")
        if self.top_k < 0:
            raise ValueError(f"--top-k is {self.top_k}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}; expected a number above 0 and at most 1")


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One token id per row of ``logits`` [b, vocabulary]; int64 [b]. Raises ``ValueError`` for NaN and infinities."""
    largest = logits.amax(-1, keepdim=True)  # NaN where there is one; -inf in single places forbids tokens
    if not largest.isfinite().all():
        raise ValueError(
            "the model's logits are NaN or infinite; give a model from before its training diverged by --load"
        )
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # the likeliest token is at 0 and the others below, so that no temperature, however small, makes an infinity
    smallest = torch.finfo(torch.float32).tiny
    scaled = (logits.float() - largest.float()) / max(sampling.temperature, smallest)
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
        logits_of: logits [1, at least vocab_size] of the token after tokens [1, s], such as the two classes below.
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


class CachedModel:
    """Logits of the next token, with keys and values of earlier tokens kept from call to call.

    When a call's tokens begin with those of the call before, only the further ones are computed; otherwise (another
    prompt, or a full context out of which old tokens drop) everything is, from the start. So it is at every call of a
    model without a cache (``has_cache`` False).

    Args:
        device: of the model; None: the one that ranks of this machine use.
    """

    has_cache = True

    def __init__(self, device: torch.device | None = None) -> None:
        self._seen: list[int] = []
        self._device = cpu_platform.device() if device is None else device

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [1, vocabulary] of the token after ``tokens`` [1, s] int64."""
        wanted = tokens[0].tolist()
        known = len(self._seen)
        if not 0 < known < len(wanted) or wanted[:known] != self._seen:
            known = 0
            self.forget()
        logits = self.forward(tokens[:, known:].to(self._device), known)
        self._seen = wanted if self.has_cache else []
        return logits

    def forget(self) -> None:
        """Drop all keys and values."""
        raise NotImplementedError

    def forward(self, tokens: torch.Tensor, known: int) -> torch.Tensor:
        """Logits [1, vocabulary] after ``tokens`` [1, s], which follow the ``known`` tokens in the cache."""
        raise NotImplementedError


class CachedMegatronModel(CachedModel):
    """An mcore ``GPTModel`` in evaluation mode on one rank, with mcore's static inference context as the cache.

    A model with n-gram layers computes all tokens again for every new one: mcore's cache keeps neither their ids nor
    what is convolved. Its export for transformers generates with a cache.

    Args:
        context: the most tokens that a call will bring.
    """

    def __init__(self, model: torch.nn.Module, context: int) -> None:
        super().__init__()
        # here, because importing mcore's inference costs time that other users of this module need not spend
        from megatron.core.inference.contexts import StaticInferenceContext

        self._model = model
        self._cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=context)
        self.has_cache = not getattr(model, "needs_whole_sequences", False)

    def forget(self) -> None:
        self._cache.reset()

    def forward(self, tokens: torch.Tensor, known: int) -> torch.Tensor:
        if not self.has_cache:
            from umv2_megatron.training.restore import next_token_logits

            return next_token_logits(self._model, tokens)
        # mcore's own attention takes either a whole prompt or a single token after it
        parts = tokens.split(1, dim=1) if known else [tokens]
        for part in parts:
            self._cache.sequence_len_offset = known
            positions = torch.arange(known, known + part.shape[1], device=part.device).unsqueeze(0)
            # with a cache, the logits of the last token alone
            logits = self._model(part, positions, None, inference_context=self._cache, runtime_gather_output=True)
            known += part.shape[1]
        return logits[:, -1]


class CachedTransformersModel(CachedModel):
    """A causal language model of transformers in evaluation mode, on ``device``."""

    def __init__(self, model: Any, device: torch.device | None = None) -> None:
        super().__init__(device)
        self._model = model
        self._cache: Any = None

    def forget(self) -> None:
        self._cache = None  # the model makes a new one

    def forward(self, tokens: torch.Tensor, known: int) -> torch.Tensor:
        output = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = getattr(output, "past_key_values", None)
        self.has_cache = self._cache is not None  # Mamba and its like keep a state of another kind
        return output.logits[:, -1]


class TextStream:
    """The text of token ids that come one by one, as soon as it is certain.

    A token may be a part of a character, and a tokenizer may write a space only between two tokens. So a few tokens
    before the new ones are always decoded with them, and text that ends in an unfinished character waits. The first of
    them begins a character: decoders of byte pieces give up a whole run of them for one part of a character in it.

    Args:
        detokenize: text of token ids.
        prompt: the ids that come before; their text is not given again.
    """

    _OVERLAP = 8
    _LONGEST = 4  # bytes, and so tokens, of a character of UTF-8

    def __init__(self, detokenize: Callable[[Iterable[int]], str], prompt: list[int]) -> None:
        self._detokenize = detokenize
        self._keep(prompt)

    def add(self, token: int) -> str:
        """The text that is new with ``token``, often empty."""
        self._ids.append(token)
        text = self._waiting()
        if not text or text.endswith("\ufffd"):
            return ""
        self._keep(self._ids)
        return text

    def end(self) -> str:
        """What has waited for the rest of a character that never came."""
        return self._waiting()

    def _keep(self, ids: list[int]) -> None:
        """Go on from the last ``_OVERLAP`` of ``ids``, or from up to three more; their text has been given."""
        latest = max(0, len(ids) - self._OVERLAP)
        starts = range(latest, max(-1, latest - self._LONGEST), -1)
        # inside a character there is at least one more U+FFFD; one that the text itself holds is in all
        start = min(starts, key=lambda start: self._detokenize(ids[start:]).count("\ufffd"))
        self._ids = ids[start:]
        self._given = len(self._ids)

    def _waiting(self) -> str:
        return self._detokenize(self._ids)[len(self._detokenize(self._ids[: self._given])) :]
