"""One choice of an answer, generated token by token.

Tokens are drawn as ``tools/generate.py`` draws them, from random numbers of the choice's own: the same seed gives the
same text whatever else the server does. Log-probabilities are those of the model, before temperature, penalties and
biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from umv2_megatron.evaluation.generation import CachedTransformersModel, Sampling, draw
from umv2_megatron.evaluation.local_export import LocalExport
from umv2_megatron.serving.released import ReleasedText, TokenLogprob

LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot write."""

ROWS_AT_ONCE = 256
"""Positions of a prompt whose log-probabilities are computed at once, [rows, vocabulary] float32."""


@dataclass(frozen=True)
class Choice:
    """What is to be generated.

    Attributes:
        index: its number in the answer.
        prompt: token ids, at least one.
        max_tokens: tokens to generate; 0 with ``echo`` alone.
        logprobs: likeliest tokens to give with each token; None: no log-probabilities.
        echo: the prompt's text, which the answer's text then begins with.
        frequency, presence: what is taken from a token's logit for each time it was generated, and once if it was.
        bias: what is added to logits, by token id.
    """

    index: int
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: str | None = None
    frequency: float = 0.0
    presence: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """What a step adds to a choice: often no text yet. ``finish`` is "stop" or "length" in the last one."""

    index: int
    text: str = ""
    tokens: tuple[TokenLogprob, ...] = ()
    generated: int = 0
    finish: str | None = None


def generate_choice(export: LocalExport, choice: Choice) -> Iterator[Piece]:
    """Yield the pieces of ``choice``; between two of them lies at most one pass of the model, with ``echo`` two.

    Raises ``ValueError`` where the model's logits are NaN or infinite.
    """
    detokenize = texts_of(export)
    offset = 0
    if choice.echo is not None:
        offset = len(choice.echo)
        scored = () if choice.logprobs is None else tuple(_of_prompt(export, choice, detokenize))
        yield Piece(choice.index, choice.echo, scored, 0, None if choice.max_tokens else "length")
    model = CachedTransformersModel(export.model, export.model.device)
    generator = torch.Generator().manual_seed(choice.seed)
    text = ReleasedText(detokenize, choice.prompt, choice.stops, offset)
    tokens = list(choice.prompt)
    for number in range(1, choice.max_tokens + 1):
        logits = model(torch.tensor([tokens]))[0, : export.vocab_size].float().cpu()
        token = int(draw(_shaped(logits, choice, tokens)[None], choice.sampling, generator))
        scored_token = None
        if choice.logprobs is not None:
            scored_token = _scored(export, choice.logprobs, logits.log_softmax(-1), token, tokens[-1], text.offset)
        tokens.append(token)
        finish = None
        if token in export.ends:
            released, ready = text.end()  # the token that ends a text is no part of it
            finish = "stop"
        else:
            released, ready = text.add(token, scored_token)
            if not text.stopped and number == choice.max_tokens:
                rest, later = text.end()
                released, ready = released + rest, ready + later
                finish = "length"
        if text.stopped:
            finish = "stop"
        yield Piece(choice.index, released, tuple(ready), 1, finish)
        if finish is not None:
            return


def texts_of(export: LocalExport) -> Callable[[Iterable[int]], str]:
    """Token ids to text, without the tokens that stand for no text."""

    def detokenize(ids: Iterable[int]) -> str:
        return export.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return detokenize


def _shaped(logits: torch.Tensor, choice: Choice, tokens: list[int]) -> torch.Tensor:
    """Logits [vocabulary] with the penalties for what was generated and the biases; OpenAI gives the formula."""
    shaped = logits
    if choice.frequency or choice.presence:
        counts = torch.bincount(torch.tensor(tokens[len(choice.prompt) :], dtype=torch.int64), minlength=len(logits))
        shaped = shaped - counts * choice.frequency - (counts > 0) * choice.presence
    if choice.bias:
        added = torch.tensor(list(choice.bias.values()))
        shaped = shaped.index_add(0, torch.tensor(list(choice.bias)), added)
    return shaped


@torch.no_grad()
def _of_prompt(
    export: LocalExport, choice: Choice, detokenize: Callable[[Iterable[int]], str]
) -> Iterator[TokenLogprob]:
    """The tokens of the prompt; all logits [s, vocabulary] come from one pass without a cache."""
    model, ids = export.model, choice.prompt
    logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1, : export.vocab_size]
    text = ReleasedText(detokenize, [], (), 0)
    shown, whole = _shown(export, ids[0], None)
    yield TokenLogprob(shown, whole, None, (), 0)
    text.add(ids[0], None)
    for first in range(0, len(logits), ROWS_AT_ONCE):
        for number, row in enumerate(logits[first : first + ROWS_AT_ONCE].float().log_softmax(-1).cpu(), first + 1):
            yield _scored(export, choice.logprobs or 0, row, ids[number], ids[number - 1], text.offset)
            text.add(ids[number], None)


def _scored(
    export: LocalExport, count: int, logprobs: torch.Tensor, token: int, before: int, offset: int
) -> TokenLogprob:
    """``token``, which follows the id ``before``, with the ``count`` likeliest of ``logprobs`` [vocabulary]."""
    best = logprobs.topk(min(count, len(logprobs)))
    top = tuple(
        (*_shown(export, other, before), max(value, LEAST))
        for other, value in zip(best.indices.tolist(), best.values.tolist())
    )
    return TokenLogprob(*_shown(export, token, before), max(float(logprobs[token]), LEAST), top, offset)


def _shown(export: LocalExport, token: int, before: int | None) -> tuple[str, bool]:
    """The text of ``token`` after the id ``before``, as decoders may write a space only between two tokens, and True.

    For a part of a character, and for one that ends it: its entry in the vocabulary, and False.
    """

    def decoded(ids: list[int]) -> str:
        return export.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    alone = decoded([token])
    if "\ufffd" in alone:
        return str(export.tokenizer.convert_ids_to_tokens(token)), False
    if before is None or "\ufffd" in decoded([before]):
        return alone, True
    return decoded([before, token])[len(decoded([before])) :], True
