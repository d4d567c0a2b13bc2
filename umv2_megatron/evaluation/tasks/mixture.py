"""Which tasks there are, the questions of an evaluation, and the documents that teach their format.

Training documents have the trained form or are symbols, and have random streams of their own ("training" where the
questions have "evaluation"), so no question is a training document. What they teach is the task, not its answers; for
fact recall they teach the facts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

from umv2_megatron.data.tokenizers import Tokenizer
from umv2_megatron.evaluation.tasks import fact_recall
from umv2_megatron.evaluation.tasks.base import FORMS, SYMBOLS, ContextTask, Document, Example, NoRoom
from umv2_megatron.evaluation.tasks.context_tasks import CONTEXT_TASKS
from umv2_megatron.evaluation.tasks.fact_recall import FactSet
from umv2_megatron.evaluation.tasks.symbol_tasks import SYMBOL_TASKS
from umv2_megatron.evaluation.tasks.words import stream

TASKS = (*CONTEXT_TASKS, fact_recall.NAME)


def task_names(flag: str, text: str) -> list[str]:
    """The tasks of a list such as ``needle,icl``; ``all`` stands for every one.

    Raises ``ValueError`` naming ``flag``.
    """
    names = list(TASKS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"{flag} holds {name!r}; expected 'all' or some of {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def integers(flag: str, text: str) -> list[int]:
    """The integers of a list such as ``256,512``, each once. Raises ``ValueError`` naming ``flag``."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise ValueError(f"{flag} is {text!r}; expected integers above 0, separated by commas")
    return list(dict.fromkeys(values))


def in_form(flag: str, names: Sequence[str], form: str) -> Sequence[str]:
    """``names``, which all have ``form``. Raises ``ValueError`` naming ``flag``."""
    if form == SYMBOLS and fact_recall.NAME in names:
        raise ValueError(f"{flag} holds {fact_recall.NAME!r}, which is not told in symbols: leave it out")
    return names


def _tasks(form: str) -> dict[str, ContextTask]:
    assert form in (*FORMS, SYMBOLS)
    return SYMBOL_TASKS if form == SYMBOLS else CONTEXT_TASKS


def questions(
    name: str,
    form: str,
    count: int,
    seed: int,
    difficulty: int,
    tokenizer: Tokenizer,
    budget: int,
    items: int | None = None,
) -> list[Example]:
    """The first ``count`` questions of a context task, each filling at most ``budget`` tokens.

    items: so many pairs, rounds or shots in each context, told again to fill it (``ContextTask.example``).
    Raises ``ValueError`` naming --context-lengths, or the flag of ``items``.
    """
    task = _tasks(form)[name]

    def tokens_of(text: str) -> int:
        return len(tokenizer.tokenize(text))

    return [
        task.example(
            functools.partial(stream, "evaluation", f"{name} {form}", seed, number),
            difficulty,
            form,
            tokens_of,
            budget,
            items,
        )
        for number in range(count)
    ]


def training_documents(
    names: Sequence[str],
    count: int,
    seed: int,
    difficulties: Sequence[int],
    lengths: Sequence[int],
    tokenizer: Tokenizer | None,
    queries: int = 4,
    facts: FactSet | None = None,
    curriculum: float = 0.0,
) -> Iterator[Document]:
    """``count`` documents of the context tasks of ``names`` in turn, and all documents of fact recall, shuffled; each
    is made when it is asked for.

    Each document of a context task draws its difficulty from ``difficulties`` and its length in tokens from
    ``lengths``, and ends with ``queries`` questions and their answers. Without a ``tokenizer`` they are in symbols.
    curriculum: the share of the documents, from the first on, over which the longest length that may be drawn grows
    from the shortest of ``lengths`` to all of them. They stay in that order, and those that are too short for the
    difficulty drawn take the highest that fits.
    """
    stages = sorted(lengths)
    tasks = _tasks(SYMBOLS if tokenizer is None else FORMS[0])
    context = [name for name in names if name in CONTEXT_TASKS]
    count = count if context else 0

    def tokens_of(text: str) -> int:
        return text.count(" ") + 1 if tokenizer is None else len(tokenizer.tokenize(text))

    def made(number: int) -> Document:
        name = context[number % len(context)]
        rng = stream("sizes", name, seed, number)
        difficulty, budget = rng.choice(list(difficulties)), rng.choice(list(lengths))
        if curriculum:
            stage = min(int(number / (curriculum * count) * len(stages)), len(stages) - 1)
            budget = rng.choice(stages[: stage + 1])
        write = functools.partial(
            tasks[name].document, functools.partial(stream, "training", name, seed, number), tokens_of=tokens_of,
            budget=budget, queries=queries,
        )  # fmt: skip
        return _hardest(write, [each for each in difficulties if each <= difficulty] if curriculum else [difficulty])

    told = (facts or FactSet()).documents() if fact_recall.NAME in names else []
    order = list(range(count + len(told)))
    if not curriculum:
        stream("order", "mixture", seed, 0).shuffle(order)
    for number in order:
        yield made(number) if number < count else Document(told[number - count])


def _hardest(write: Callable[..., Document], difficulties: Sequence[int]) -> Document:
    """A document of the highest of ``difficulties`` that its length has room for."""
    *harder, lowest = sorted(difficulties, reverse=True)
    for difficulty in harder:
        with contextlib.suppress(NoRoom):
            return write(difficulty=difficulty)
    return write(difficulty=lowest)
