"""From a model's token scores to the numbers of a task.

A question is a row of tokens: the end-of-document token that precedes every document in training, the prompt, and an
answer. What is scored are the tokens that the answer adds to the prompt (``answer_row``). The answer is right under
greedy decoding when each of its tokens is the likeliest after the true ones before it: had the model gone on alone, it
would have written the same. So one forward pass over a row decides, without generating.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from umv2_megatron.data.tokenizers import Tokenizer
from umv2_megatron.evaluation.scoring_model import ScoringModel
from umv2_megatron.evaluation.tasks.base import Example


@dataclass(frozen=True)
class Scored:
    """One question answered. exact: greedy decoding writes the answer. log_likelihood: of the answer, nats.

    chosen: share of the likeliest choices that is right: 1 or 0, unless several are equally likely; None without any.
    """

    exact: bool
    log_likelihood: float
    tokens: int
    chosen: float | None


@dataclass(frozen=True)
class Summary:
    """The numbers of some questions. ``*_se``: standard errors of the means; ``*_chance``: what guessing gets.

    exact_match: share of answers that greedy decoding writes; its chance is picking among the values that stand in the
    prompt. choice_accuracy: share of questions whose answer is likelier than the others offered (None: none are).
    answer_nats: mean negative log-likelihood of an answer; answer_nats_per_token: over all answers' tokens.
    """

    examples: int
    exact_match: float
    exact_match_se: float | None
    exact_match_chance: float
    choice_accuracy: float | None
    choice_accuracy_se: float | None
    choice_accuracy_chance: float | None
    answer_nats: float
    answer_nats_se: float | None
    answer_nats_per_token: float


def answer_row(tokenizer: Tokenizer, first_token: int, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of ``first_token``, prompt and answer, and where the answer's tokens begin.

    A tokenizer may join the end of the prompt and the beginning of the answer into one token. The answer's tokens then
    begin with that one: the first in which prompt with answer differs from the prompt alone.
    """
    alone, whole = tokenizer.tokenize(prompt), tokenizer.tokenize(prompt + answer)
    same = 0
    while same < min(len(alone), len(whole) - 1) and alone[same] == whole[same]:
        same += 1
    return [first_token, *whole], 1 + same


def score(model: ScoringModel, examples: Sequence[Example], batch: int = 64) -> list[Scored]:
    """Score every example, ``batch`` rows per call of the model. Rows of like length go together.

    Raises ``ValueError`` naming --context-lengths for a row longer than the model can read.
    """
    rows: list[tuple[list[int], int]] = []
    owners: list[tuple[int, int]] = []
    for number, example in enumerate(examples):
        for choice, answer in enumerate(example.choices or (example.answer,)):
            rows.append(answer_row(model.tokenizer, model.first_token, example.prompt, answer))
            owners.append((number, choice))
    _check_lengths(model, rows)
    found: dict[tuple[int, int], tuple[float, bool, int]] = {}
    order = sorted(range(len(rows)), key=lambda row: (len(rows[row][0]), row))
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        for row, result in zip(chosen, _score_rows(model, [rows[row] for row in chosen])):
            found[owners[row]] = result
    return [_judge(example, number, found) for number, example in enumerate(examples)]


def _check_lengths(model: ScoringModel, rows: Sequence[tuple[list[int], int]]) -> None:
    longest = max(len(ids) - 1 for ids, _ in rows)
    if model.longest_context is not None and longest > model.longest_context:
        raise ValueError(
            f"--context-lengths asks for rows of {longest} tokens; the model's positions end at {model.longest_context}"
        )


def _score_rows(model: ScoringModel, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool, int]]:
    """Log-likelihood (nats), whether it is the greedy continuation, and tokens, of each row's answer."""
    tokens = torch.full((len(rows), max(len(ids) for ids, _ in rows)), model.tokenizer.eod)
    for row, (ids, _) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    scores = model.logprobs(tokens)
    results = []
    for row, (ids, start) in enumerate(rows):
        target = slice(start - 1, len(ids) - 1)  # position j scores token j + 1
        likelihood = scores.log_likelihood[row, target].double().sum().item()
        exact = bool((scores.argmax[row, target] == tokens[row, start : len(ids)]).all())
        results.append((likelihood, exact, len(ids) - start))
    return results


def _judge(example: Example, number: int, found: dict[tuple[int, int], tuple[float, bool, int]]) -> Scored:
    if not example.choices:
        likelihood, exact, tokens = found[number, 0]
        return Scored(exact, likelihood, tokens, None)
    right = example.choices.index(example.answer)
    likelihood, exact, tokens = found[number, right]
    all_of_them = [found[number, choice][0] for choice in range(len(example.choices))]
    # equally likely up to rounding in fp32: a guess among them is right once in so many times
    best = max(all_of_them)
    ties = [each >= best - 1e-6 * max(1.0, abs(best)) for each in all_of_them]
    return Scored(exact, likelihood, tokens, ties[right] / sum(ties) if len(ties) > 1 else None)


def summarize(examples: Sequence[Example], scored: Sequence[Scored]) -> Summary:
    """Means, standard errors and chance levels."""
    exact = [float(each.exact) for each in scored]
    nats = [-each.log_likelihood for each in scored]
    with_choices = [(example, each.chosen) for example, each in zip(examples, scored) if each.chosen is not None]
    chosen = [value for _, value in with_choices if value is not None]
    chances = [1 / len(example.choices) for example, _ in with_choices]
    return Summary(
        examples=len(scored),
        exact_match=_mean(exact),
        exact_match_se=_standard_error(exact),
        exact_match_chance=_mean([1 / example.candidates for example in examples]),
        choice_accuracy=_mean(chosen) if chosen else None,
        choice_accuracy_se=_standard_error(chosen) if chosen else None,
        choice_accuracy_chance=_mean(chances) if chances else None,
        answer_nats=_mean(nats),
        answer_nats_se=_standard_error(nats),
        answer_nats_per_token=sum(nats) / sum(each.tokens for each in scored),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float | None:
    """Sample standard deviation over the square root of the count; None for a single value."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
