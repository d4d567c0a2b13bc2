"""A program that reads a prompt and answers, and "models" that put probability where it says, or nowhere.

The oracle knows no example: it has only the text of a row, finds the question in it, and looks for the answer in what
stands before, or for fact recall in training documents it was given.
"""

from __future__ import annotations

import math
import re

import torch

from umv2_megatron.evaluation.scoring_model import TokenScores
from umv2_megatron.evaluation.tasks.fact_recall import HELD_OUT, SENTENCES
from umv2_megatron.evaluation.tasks.scoring import answer_row

# (task, form) -> the end of a prompt, with what it asks for
CUES = {
    ("memorize", "trained"): r"after (\w+ \w+):",
    ("memorize", "zero-shot"): r"After (\w+ \w+) came",
    ("multi-round", "trained"): r"user: get (\w+)\nbot:",
    ("multi-round", "zero-shot"): r"What is my (\w+) now\?\nAssistant: It is",
    ("icl", "trained"): r"(\w+):",
    ("icl", "zero-shot"): r"(\w+) belongs to",
    ("needle", "trained"): r"code of (\w+):",
    ("needle", "zero-shot"): r"code of (\w+), which the text above tells\?\nAnswer: It is",
    ("key-value", "trained"): r"get (\w+) =",
    ("key-value", "zero-shot"): r"value of (\w+)\?\nAnswer: It is",
    ("multi-hop", "trained"): r"(\d+ on from \w+):",
    ("multi-hop", "zero-shot"): r"(\w+ and goes \d+) links on\?\nAnswer: At",
}
TELLING = {
    "multi-round": r"(?:set|My) (\w+) (?:is )?(\w+)",
    "icl": r"(\w+)(?:: | belongs to )(\w+)",
    "needle": r"The code of (\w+) is (\w+)\.",
    "key-value": r"(?:The value of )?(\w+) (?:=|is) ([\w ]+)",
    "multi-hop": r"(\w+) (?:>|leads to) (\w+)",
}


class Oracle:
    """Splits a text into prompt and answer and gives the right answer. ``documents``: what fact recall has read."""

    def __init__(self, task: str, form: str, difficulty: int = 1, documents: list[str] | None = None) -> None:
        self.task, self.form, self.difficulty = task, form, difficulty
        self.known: dict[tuple[str, str], str] = {}
        for document in documents or []:
            for sentence in SENTENCES:
                self.known.update(self._facts(sentence, document))

    @staticmethod
    def _pattern(sentence: str) -> str:
        words = {"relation": "(?P<relation>[a-z]+)", "person": "(?P<person>[A-Z][a-z]+ [A-Z][a-z]+)"}
        return sentence.replace("?", r"\?").format(**words)

    def _facts(self, sentence: str, document: str) -> dict[tuple[str, str], str]:
        told = re.finditer(self._pattern(sentence) + r" (?P<value>[A-Z][a-z]+)\.", document)
        return {(fact["person"], fact["relation"]): fact["value"] for fact in told}

    def read(self, text: str) -> tuple[str, str]:
        """Prompt and right answer of a row's text."""
        if self.task == "fact-recall":
            sentences = [HELD_OUT] if self.form == "zero-shot" else SENTENCES
            asked = next(m for each in sentences if (m := re.match(self._pattern(each), text)))
            return text[: asked.end()], f" {self.known.get((asked['person'], asked['relation']), 'unknown')}."
        question = list(re.finditer(CUES[self.task, self.form], text))[-1]
        answer = self._answer(text[: question.start()], question[1])
        return text[: question.end()], f" {answer}.\n" if self.form == "zero-shot" else f" {answer}\n"

    def _answer(self, context: str, asked: str) -> str:
        if self.task == "memorize":
            words = context.replace(".", "").split()
            at = next(i for i in range(len(words)) if words[i : i + 2] == asked.split())
            return " ".join(words[at + 2 : at + 2 + self.difficulty])
        told = dict(re.findall(TELLING[self.task], context))
        if self.task == "icl":
            return {word[:2]: label for word, label in told.items()}[asked[:2]]
        if self.task == "multi-hop":
            (hops,), (at,) = re.findall(r"\d+", asked), re.findall(r"\b[a-z]{6}\b", asked)
            for _ in range(int(hops)):
                at = told[at]
            return at
        return told[asked]


class SymbolOracle:
    """The same for questions in symbols. ``tell``: the answer, from the words before a question and those of it."""

    def __init__(self, task: str, difficulty: int) -> None:
        self.tell = getattr(self, "_" + task.replace("-", "_"))
        self.difficulty = difficulty
        self.asks = 2 if task in ("memorize", "icl", "multi-hop") else 1  # words of a question

    def read(self, text: str) -> tuple[str, str]:
        """Prompt and right answer of a row's text."""
        words = text.split()
        at = len(words) - words[::-1].index("?")
        asked = words[at : at + self.asks]
        told = self.tell(words[1 : words.index("?")], asked, words[1:at])
        return " ".join(words[: at + self.asks]), "".join(f" {word}" for word in told)

    def _key_value(self, told: list[str], asked: list[str], _: list[str]) -> list[str]:
        step = 1 + self.difficulty
        pairs = [told[at : at + step] for at in range(0, len(told), step)]
        return next(value for key, *value in pairs if key == asked[0])

    def _memorize(self, told: list[str], asked: list[str], _: list[str]) -> list[str]:
        found = [at for at in range(len(told) - 1) if told[at : at + 2] == asked]
        assert len(found) == 1, "a cue that occurs once"
        return told[found[0] + 2 : found[0] + 2 + self.difficulty]

    def _multi_round(self, _: list[str], asked: list[str], everything: list[str]) -> list[str]:
        told, at = {}, 0
        while at < len(everything) - 1:
            if everything[at] == "?":
                assert told[everything[at + 1]] == everything[at + 2], "a question in the conversation"
                assert everything[at + 3] == "."
                at += 4
            else:
                told[everything[at]] = everything[at + 1]
                at += 2
        return [told[asked[0]]]

    def _icl(self, told: list[str], asked: list[str], _: list[str]) -> list[str]:
        labels = {(told[at], told[at + 2]) for at in range(0, len(told), 3)}
        (answer,) = [label for kind, label in labels if kind == asked[0]]
        return [answer]

    def _needle(self, told: list[str], asked: list[str], _: list[str]) -> list[str]:
        (answer,) = [told[at + 2] for at, word in enumerate(told) if word == "#" and told[at + 1] == asked[0]]
        return [answer]

    def _multi_hop(self, told: list[str], asked: list[str], _: list[str]) -> list[str]:
        links, (hops, at) = dict(zip(told[::2], told[1::2])), asked
        for _ in range(int(hops)):
            at = links[at]
        return [at]


class OracleModel:
    """Puts probability 0.99 on each token of the oracle's answer where that is due, 1 in ``vocab_size`` elsewhere."""

    context, longest_context = 128, None

    def __init__(self, oracle: Oracle, tokenizer) -> None:
        self.oracle, self.tokenizer, self.first_token = oracle, tokenizer, tokenizer.eod

    def logprobs(self, tokens: torch.Tensor) -> TokenScores:
        likelihood = torch.full((len(tokens), tokens.shape[1] - 1), -math.log(self.tokenizer.vocab_size))
        best = torch.zeros_like(likelihood, dtype=torch.int64)
        for row, ids in enumerate(tokens):
            prompt, answer = self.oracle.read(self.tokenizer.detokenize(ids.tolist()))
            right, start = answer_row(self.tokenizer, self.first_token, prompt, answer)
            for at in range(start, min(len(right), len(ids))):
                best[row, at - 1] = right[at]
                likelihood[row, at - 1] = math.log(0.99) if right[at] == ids[at] else math.log(1e-4)
        return TokenScores(likelihood, best)


class UniformModel:
    """Every token is equally likely; the first one is the likeliest."""

    context, longest_context = 16, None

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.first_token = tokenizer, tokenizer.eod

    def logprobs(self, tokens: torch.Tensor) -> TokenScores:
        shape = (len(tokens), tokens.shape[1] - 1)
        return TokenScores(torch.full(shape, -math.log(self.tokenizer.vocab_size)), torch.zeros(shape).long())
