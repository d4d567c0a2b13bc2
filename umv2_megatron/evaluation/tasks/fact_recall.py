"""Facts that stand only in the training documents, and questions that give no context: recall from the weights.

A fact is a person, a relation and a value: "The town of Zeno Bakuri is Rilo." Facts are divided evenly over the
numbers of times that they occur in the training documents, 0, 1, 2, 4, ... up to a maximum; 0 is the control group.
Each time a fact is told in another of several sentences (over again after the last), and the sentences of all facts are
shuffled and joined into documents, so that what stands beside a fact says nothing about it. Among the facts of each
frequency every value of a relation is equally common: who only knows how often values occur stays at chance.

The facts follow from the seed alone, and the questions from the facts: training and evaluation must name the same seed,
number of facts and maximum. That is the one task whose training documents and questions belong together. A question in
the *trained* form is one of the six sentences, drawn whether or not it told this fact, broken off before the value; in
the *zero-shot* form it is a sentence that never occurs in training. Counts are per pass over the documents: a run that
reads them twice sees each fact twice as often.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from umv2_megatron.evaluation.tasks.base import Example, Query, offer
from umv2_megatron.evaluation.tasks.words import distinct_words, most_words, stream, word

NAME = "fact-recall"
RELATIONS = ("town", "teacher", "horse", "song")
# Values that one relation can have: a guesser who knows them all is right once in so many times.
VALUES = 16
SENTENCES = (
    "The {relation} of {person} is",
    "{person} has a {relation} called",
    "For {person} the {relation} is",
    "As for {person}, the {relation} is named",
    "The name of the {relation} that belongs to {person} is",
    "Asked for a {relation}, {person} says",
)
HELD_OUT = "Question: What is the {relation} of {person} called?\nAnswer: It is called"
SENTENCES_PER_DOCUMENT = 8
SURNAME_SYLLABLES = 3


@dataclass(frozen=True)
class Fact:
    """``times``: occurrences in the training documents."""

    person: str
    relation: str
    value: str
    times: int


@dataclass(frozen=True)
class FactSet:
    """All facts of one seed: ``per_frequency`` facts for each of 0, 1, 2, 4, ... ``max_frequency`` occurrences.

    Raises ``ValueError`` naming the flag where a frequency cannot have every value equally often.
    """

    seed: int = 1
    per_frequency: int = 64
    max_frequency: int = 64

    def __post_init__(self) -> None:
        whole = VALUES * len(RELATIONS)
        if self.per_frequency < 1 or self.per_frequency % whole:
            raise ValueError(
                f"--facts-per-frequency is {self.per_frequency}; expected a multiple of {whole}, with which each of "
                f"the {VALUES} values of each of the {len(RELATIONS)} relations is equally common"
            )
        if self.max_frequency < 1:
            raise ValueError(f"--max-fact-frequency is {self.max_frequency}; expected 1 or more")
        most = most_words(SURNAME_SYLLABLES) // len(self.frequencies) // whole * whole
        if self.per_frequency > most:
            raise ValueError(
                f"--facts-per-frequency is {self.per_frequency}; expected at most {most} with --max-fact-frequency "
                f"{self.max_frequency}, because no more persons have names of their own"
            )

    @property
    def frequencies(self) -> list[int]:
        """0 and the powers of two up to the maximum."""
        return [0] + [1 << power for power in range(self.max_frequency.bit_length())]

    @property
    def values(self) -> dict[str, list[str]]:
        """The values that each relation can have."""
        words = distinct_words(stream("values", NAME, self.seed, 0), VALUES * len(RELATIONS), 2)
        return {
            relation: [value.capitalize() for value in words[at * VALUES : (at + 1) * VALUES]]
            for at, relation in enumerate(RELATIONS)
        }

    def facts(self) -> list[Fact]:
        """The facts in the order of their frequencies; no person has two."""
        rng, values = stream("facts", NAME, self.seed, 0), self.values
        surnames = iter(distinct_words(rng, self.per_frequency * len(self.frequencies), SURNAME_SYLLABLES))
        made = []
        for times in self.frequencies:
            told = [(relation, value) for relation in RELATIONS for value in values[relation]]
            for relation, value in told * (self.per_frequency // len(told)):
                person = f"{word(rng, 2).capitalize()} {next(surnames).capitalize()}"
                made.append(Fact(person, relation, value, times))
        return made

    def documents(self) -> list[str]:
        """The training documents: every fact as often as its frequency says."""
        rng = stream("documents", NAME, self.seed, 0)
        told = []
        for fact in self.facts():
            order = rng.sample(range(len(SENTENCES)), len(SENTENCES))
            for time in range(fact.times):
                told.append(_stem(SENTENCES[order[time % len(order)]], fact) + _end(fact.value))
        rng.shuffle(told)
        return [" ".join(told[at : at + SENTENCES_PER_DOCUMENT]) for at in range(0, len(told), SENTENCES_PER_DOCUMENT)]

    def questions(self, form: str, limit: int | None = None, seed: int = 0) -> list[Example]:
        """One question per fact, at most ``limit`` of each frequency; ``details`` holds ``times_seen``.

        ``seed`` chooses which, the sentences and the wrong answers offered; it does not change the facts.
        """
        values, made = self.values, []
        facts = list(enumerate(self.facts()))
        stream("evaluation order", NAME, seed, 0).shuffle(facts)
        counts: dict[int, int] = {}
        for number, fact in facts:
            counts[fact.times] = counts.get(fact.times, 0) + 1
            if limit is not None and counts[fact.times] > limit:
                continue
            rng: random.Random = stream("evaluation", NAME, seed, number)
            prompt = _stem(HELD_OUT if form == "zero-shot" else rng.choice(SENTENCES), fact)
            wrong = tuple(_end(value) for value in values[fact.relation] if value != fact.value)
            query = Query(prompt, _end(fact.value), wrong, VALUES)
            made.append(offer(rng, prompt, query, {"times_seen": fact.times}))
        return made


def _stem(sentence: str, fact: Fact) -> str:
    return sentence.format(relation=fact.relation, person=fact.person)


def _end(value: str) -> str:
    return f" {value}."
