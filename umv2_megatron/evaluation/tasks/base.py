"""What an example and a task are, and how a prompt is made to fill a context of a given number of tokens."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

FORMS = ("trained", "zero-shot")
"""Of questions in words."""
SYMBOLS = "symbols"
"""The form of questions in symbols of one token each (``symbol_tasks.py``)."""
# Answers offered per question, the right one among them.
CHOICES = 4


class NoRoom(ValueError):
    """Not even the smallest context fits in the tokens given."""


@dataclass(frozen=True)
class Query:
    """A question about a context: the text up to the answer, and the answer with its white space and final mark.

    wrong: other answers of the same kind and length. candidates: how many answers a guesser would choose from who
    knows the format and the context but not which item is asked for.
    """

    prompt: str
    answer: str
    wrong: tuple[str, ...]
    candidates: int


@dataclass(frozen=True)
class Example:
    """One scored question: a prompt, its answer, and all the answers offered (``answer`` among them, or none)."""

    prompt: str
    answer: str
    choices: tuple[str, ...]
    candidates: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Situation:
    """A context and the questions about it; ``details`` go into the report of each example.

    opening: what the context begins with, before its items. items: each of them as it is told; none where a task has
    none that are counted.
    """

    context: str
    queries: list[Query]
    details: dict[str, Any] = field(default_factory=dict)
    opening: str = ""
    items: tuple[str, ...] = ()

    def told_before(self, count: int) -> Situation:
        """The same with ``count`` items told before all of them, in turn so that the last is told before the first."""
        rounds = -(-count // len(self.items))
        filling = (rounds * self.items)[rounds * len(self.items) - count :]
        rest = self.context.removeprefix(self.opening)
        return dataclasses.replace(self, context=self.opening + "".join(filling) + rest)


@dataclass(frozen=True)
class Document:
    """A training document: a context, and questions with their answers."""

    context: str
    queries: Sequence[Query] = ()

    @property
    def text(self) -> str:
        """The whole."""
        return self.context + "".join(query.prompt + query.answer for query in self.queries)


# build(random stream, items of context, difficulty, zero-shot?, number of questions)
Build = Callable[[random.Random, int, int, bool, int], Situation]


@dataclass(frozen=True)
class ContextTask:
    """A task whose answers stand in the context.

    ``difficulty`` is an integer from 1; what it counts is said in ``difficulty_means``.
    """

    name: str
    summary: str
    difficulty_means: str
    build: Build
    counted: str = ""
    """What its items are, where their number can be asked for: a key of ``Situation.details``."""

    def example(
        self,
        rng_of: Callable[[], random.Random],
        difficulty: int,
        form: str,
        tokens_of: Callable[[str], int],
        budget: int,
        count: int | None = None,
    ) -> Example:
        """The question whose prompt and longest answer fill at most ``budget`` tokens, as far as items go.

        ``rng_of`` gives the example's random stream afresh; ``tokens_of`` counts the tokens of a text. count: so many
        items, some or all of them told before, as often as ``budget`` has room for; None: as many items as it has room
        for.
        Raises ``NoRoom`` naming --context-lengths when not even the smallest context, or ``count`` items, fits, and
        ``ValueError`` naming the flag of ``count`` when that is too low for the task.
        """
        zero_shot = form == "zero-shot"

        def made(size: int) -> Example:
            situation = self.build(rng_of(), count or size, difficulty, zero_shot, 1)
            if count is not None:
                least = situation.details[self.counted]
                if least != count:
                    raise ValueError(
                        f"--num-{self.counted} holds {count}; {self.name} of --difficulty {difficulty} takes {least} "
                        "or more: give more, or a lower difficulty"
                    )
                situation = situation.told_before(size - 1)
            query = situation.queries[0]
            return offer(rng_of(), situation.context + query.prompt, query, situation.details)

        name = self.name if count is None else f"{self.name} with {count} {self.counted}"
        return largest(made, lambda example: longest_tokens(example, tokens_of), budget, f"{name}, {form} form,")

    def document(
        self,
        rng_of: Callable[[], random.Random],
        difficulty: int,
        tokens_of: Callable[[str], int],
        budget: int,
        queries: int,
    ) -> Document:
        """A training document: a context (in words: of the trained form) and ``queries`` questions with answers."""

        def made(items: int) -> Document:
            situation = self.build(rng_of(), items, difficulty, False, queries)
            return Document(situation.context, situation.queries)

        return largest(made, lambda document: tokens_of(document.text), budget, self.name)


def offer(rng: random.Random, prompt: str, query: Query, details: dict[str, Any]) -> Example:
    """An example with the answer among at most ``CHOICES`` choices, at a random place."""
    wrong = [answer for answer in dict.fromkeys(query.wrong) if answer != query.answer]
    choices = rng.sample(wrong, min(len(wrong), CHOICES - 1))
    choices.insert(rng.randint(0, len(choices)), query.answer)
    return Example(prompt, query.answer, tuple(choices), query.candidates, details)


def longest_tokens(example: Example, tokens_of: Callable[[str], int]) -> int:
    """Tokens of the prompt with its longest answer."""
    return max(tokens_of(example.prompt + answer) for answer in (example.choices or (example.answer,)))


def largest(made: Callable[[int], Any], length_of: Callable[[Any], int], budget: int, name: str) -> Any:
    """``made(n)`` of the largest n found whose length is within ``budget``.

    Length is taken for a straight line, which it nearly is: through the last two n that fit, where the next is at most
    twice as large, as there are tasks that refuse a large n; then through one that fits and one that does not. Where
    that leaves more than half of what lay between them, the next is their middle. Length need not grow with n
    everywhere, only on the whole; the result always fits.
    """
    best, fits, over = made(1), 1, 2
    shortest = length_of(best)
    if shortest > budget:
        raise NoRoom(
            f"--context-lengths (--lengths of make_tasks.py) holds {budget}; the smallest example of {name} takes "
            f"{shortest} tokens: give a longer context or a lower --difficulty"
        )
    length = shortest
    while (longer := length_of(candidate := made(over))) <= budget:
        missing = (budget - longer) * (over - fits) // max(longer - length, 1)
        best, fits, length = candidate, over, longer
        over += min(max(missing, 1), over)
    between = 0  # of the guess before
    while over - fits > 1:
        guess = fits + (budget - length) * (over - fits) // (longer - length)
        if 2 * (over - fits) > between > 0:
            guess = (fits + over) // 2
        guess, between = min(max(guess, fits + 1), over - 1), over - fits
        if (found := length_of(candidate := made(guess))) <= budget:
            best, fits, length = candidate, guess, found
        else:
            over, longer = guess, found
    return best
