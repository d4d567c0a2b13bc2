"""One choice, of a model that is a table: the token after a token is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from umv2_megatron.evaluation.generation import Sampling
from umv2_megatron.evaluation.local_export import LocalExport
from umv2_megatron.serving.choices import Choice, Piece, generate_choice

LETTERS = "abcd."
FOLLOWS = {0: 1, 1: 2, 2: 0, 3: 4}  # a b c a b c ...; d ends
SCORES = torch.tensor([0.0, -1.0, -2.0, -3.0, -4.0]).log_softmax(-1)


class Table(torch.nn.Module):
    """Gives the token that follows the log-probability SCORES[0], and others, in their order, the lower ones."""

    device = torch.device("cpu")

    def forward(self, ids: torch.Tensor, **options: Any) -> Any:
        logits = torch.full((1, ids.shape[1], 6), 50.0)  # id 5 pads the vocabulary
        for place, token in enumerate(ids[0].tolist()):
            first = FOLLOWS[token]
            order = [first, *(other for other in range(5) if other != first)]
            logits[0, place, order] = SCORES
        return SimpleNamespace(logits=logits)


class Letters:
    """A tokenizer of one token per letter."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(LETTERS[token] for token in ids)


def pieces(prompt: str, max_tokens: int, **options: Any) -> list[Piece]:
    export = LocalExport(Table(), Letters(), "umv2", 100, 5, frozenset([4]))
    ids = [LETTERS.index(letter) for letter in prompt]
    sampling = options.pop("sampling", Sampling(0.0, 0, 1.0))
    return list(generate_choice(export, Choice(0, ids, max_tokens, sampling, seed=0, **options)))


def text(prompt: str, max_tokens: int, **options: Any) -> str:
    return "".join(piece.text for piece in pieces(prompt, max_tokens, **options))


def test_every_token_is_a_step_and_the_last_one_says_why() -> None:
    found = pieces("a", 4)
    assert [piece.text for piece in found] == ["b", "c", "a", "b"]
    assert [piece.finish for piece in found] == [None, None, None, "length"]
    assert [piece.generated for piece in found] == [1, 1, 1, 1]
    (ended,) = pieces("d", 4)
    assert (ended.text, ended.finish, ended.generated) == ("", "stop", 1)
    assert [(piece.text, piece.finish) for piece in pieces("a", 9, stops=("ca",))] == [
        ("b", None), ("", None), ("", "stop")]  # fmt: skip


def test_penalties_are_for_what_was_generated_and_biases_for_all() -> None:
    # after a: b 0, a -1, c -2, d -3; d wins once b, a and c are more than 3, 2 and 1 lower
    assert text("a", 3, presence=1.5) == "bca"  # the a of the prompt does not count
    assert text("a", 4, presence=3.5) == "bcad"
    assert text("a", 7, presence=1.8) == "bcabcab"
    assert text("a", 7, frequency=1.8) == "bcabcad"  # b came twice
    assert text("a", 2, bias={2: 1.9}) == "bc" and text("a", 1, bias={2: 2.1}) == "c"
    assert text("a", 3, bias={0: -100.0, 1: -100.0, 2: -100.0, 4: -100.0}) == "ddd"


def test_log_probabilities_do_not_know_of_biases_and_padding() -> None:
    (piece,) = pieces("a", 1, logprobs=2, bias={3: 100.0})
    (token,) = piece.tokens
    assert (token.text, token.offset) == ("d", 0) and token.logprob == pytest.approx(float(SCORES[3]))
    assert [(text, logprob) for text, _, logprob in token.top] == [
        ("b", pytest.approx(float(SCORES[0]))), ("a", pytest.approx(float(SCORES[1])))]  # fmt: skip


def test_an_echo_scores_the_prompt() -> None:
    (piece,) = pieces("aba", 0, logprobs=1, echo="aba")
    assert (piece.text, piece.generated, piece.finish) == ("aba", 0, "length")
    assert [token.text for token in piece.tokens] == ["a", "b", "a"]
    assert [token.offset for token in piece.tokens] == [0, 1, 2]
    # a follows b as the second best: c first, then a, d, ...
    assert piece.tokens[0].logprob is None and piece.tokens[1].logprob == pytest.approx(float(SCORES[0]))
    assert piece.tokens[2].logprob == pytest.approx(float(SCORES[1]))
    assert [piece.text for piece in pieces("a", 2, echo="a")] == ["a", "b", "c"]
