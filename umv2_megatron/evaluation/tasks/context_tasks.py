"""Six tasks whose answer stands in the prompt; ``CONTEXT_TASKS`` lists them by name.

Each has a *trained* form, terse and made for training documents, and a *zero-shot* form in plain English sentences that
never occur in them. ``items`` says how much context there is; each ``build`` keeps to a minimum of its own, so that
every question has an answer and wrong answers to offer. All answers end with a line feed (zero-shot: where a
sentence ends, a full stop before it), which decides where the last word ends.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from umv2_megatron.evaluation.tasks.base import CHOICES, ContextTask, Query, Situation
from umv2_megatron.evaluation.tasks.words import SYLLABLES, distinct_words, word


def _others(rng: random.Random, values: Sequence[str], answer: str) -> list[str]:
    """Some of ``values`` other than ``answer``, enough to choose wrong answers from."""
    different = [value for value in dict.fromkeys(values) if value != answer]
    return rng.sample(different, min(len(different), CHOICES - 1))


def _some(rng: random.Random, items: Sequence[Any], count: int) -> list[Any]:
    """What ``count`` questions ask for, nothing twice: the second answer could be copied from the first."""
    return rng.sample(items, min(count, len(items)))


def _ends(answers: Sequence[str], zero_shot: bool) -> tuple[str, ...]:
    """Answers as they stand after a prompt."""
    return tuple(f" {answer}.\n" if zero_shot else f" {answer}\n" for answer in answers)


def _query(prompt: str, answer: str, wrong: Sequence[str], candidates: int, zero_shot: bool) -> Query:
    right, *rest = _ends([answer, *wrong], zero_shot)
    return Query(prompt, right, tuple(rest), candidates)


def memorize(rng: random.Random, items: int, difficulty: int, zero_shot: bool, queries: int) -> Situation:
    """A passage of different words; given two neighbours, tell the ``difficulty`` words after them."""
    count = max(items, difficulty + CHOICES + 2)
    words = distinct_words(rng, count, 3)
    context = f"Read these words and keep them in mind: {' '.join(words)}.\n" if zero_shot else f"{' '.join(words)}\n"
    spans = [" ".join(words[at : at + difficulty]) for at in range(2, count - difficulty + 1)]
    made = []
    for at in _some(rng, range(len(spans)), queries):
        cue = f"{words[at]} {words[at + 1]}"
        ask = (
            f"Question: Which words came after {cue} above?\nAnswer: After {cue} came" if zero_shot else f"after {cue}:"
        )
        made.append(_query(ask, spans[at], _others(rng, spans, spans[at]), len(spans), zero_shot))
    return Situation(context, made)


def multi_round(rng: random.Random, items: int, difficulty: int, zero_shot: bool, queries: int) -> Situation:
    """A conversation that sets names to values, each name ``difficulty`` times on average; the last value counts.

    Every fifth round asks for a value already set.
    """
    names = distinct_words(rng, max(2, items // difficulty), 3)
    count = max(items, len(names) * difficulty, CHOICES - 1)
    order = names + [rng.choice(names) for _ in range(count - len(names))]
    rng.shuffle(order)
    values: dict[str, list[str]] = {name: [] for name in names}
    rounds, lines = [], []
    for name in order:
        value = word(rng, 2)
        values[name].append(value)
        told = (
            f"User: My {name} is {value}.\nAssistant: Noted.\n" if zero_shot else f"user: set {name} {value}\nbot: ok\n"
        )
        rounds.append(told)
        lines.append(told)
        if len(lines) % 5 == 4:
            asked = rng.choice([known for known in names if values[known]])
            lines.append(_ask_round(asked, zero_shot) + _ends([values[asked][-1]], zero_shot)[0])
    everything = [value for name in names for value in values[name]]
    final = {values[name][-1] for name in names}
    made = []
    for asked in _some(rng, names, queries):
        answer, earlier = values[asked][-1], [old for old in values[asked][:-1] if old != values[asked][-1]]
        wrong = list(dict.fromkeys(earlier))[-2:] + _others(rng, everything, answer)
        made.append(_query(_ask_round(asked, zero_shot), answer, wrong[: CHOICES - 1], len(final), zero_shot))
    return Situation("".join(lines), made, {"rounds": len(order)}, items=tuple(rounds))


def _ask_round(name: str, zero_shot: bool) -> str:
    if zero_shot:
        return f"User: What is my {name} now?\nAssistant: It is"
    return f"user: get {name}\nbot:"


def in_context_learning(rng: random.Random, items: int, difficulty: int, zero_shot: bool, queries: int) -> Situation:
    """Words and their labels, 2 x ``difficulty`` of them; the label follows from the first syllable, two to a label.

    The word asked for is new, but its first syllable has been shown.
    """
    labels = distinct_words(rng, 2 * difficulty, 2)
    starts = rng.sample(SYLLABLES, min(2 * len(labels), len(SYLLABLES)))
    rule = {start: labels[index % len(labels)] for index, start in enumerate(starts)}
    shown: dict[str, str] = {}
    drawn = starts[: len(labels)]  # every label is shown
    while len(shown) < max(items, len(labels)):
        start = drawn[len(shown)] if len(shown) < len(drawn) else rng.choice(starts)
        shown[start + word(rng, 3)] = rule[start]
    line = "{} belongs to {}.\n" if zero_shot else "{}: {}\n"
    order = rng.sample(list(shown), len(shown))
    told = tuple(line.format(new, shown[new]) for new in order)
    opening = "Learn from these examples which group a word belongs to.\n" if zero_shot else ""
    seen = sorted({new[:2] for new in shown})
    made = []
    for _ in range(queries):
        start = rng.choice(seen)
        new = start + word(rng, 3)
        while new in shown:
            new = start + word(rng, 3)
        ask = f"Question: Which group does {new} belong to?\nAnswer: {new} belongs to" if zero_shot else f"{new}:"
        answer = rule[start]
        made.append(_query(ask, answer, _others(rng, labels, answer), len(set(shown.values())), zero_shot))
    return Situation(opening + "".join(told), made, {"shots": len(shown)}, opening, told)


def needle(rng: random.Random, items: int, difficulty: int, zero_shot: bool, queries: int) -> Situation:
    """Sentences of random words with ``difficulty`` codes hidden among them; tell one of the codes.

    Its guesser takes any word of the text: who knows what a code looks like has solved the task of one needle.
    """
    names, codes = distinct_words(rng, difficulty, 2), distinct_words(rng, difficulty, 2)
    filler = [[word(rng, 2) for _ in range(rng.randint(4, 8))] for _ in range(max(items, 2))]
    sentences = [" ".join(sentence) + "." for sentence in filler]
    places = {}
    for name, code in zip(names, codes):
        at = rng.randint(0, len(sentences))
        sentences.insert(at, f"The code of {name} is {code}.")
        places[name] = round(at / (len(sentences) - 1), 3)
    context = " ".join(sentences) + "\n"
    words = [each for sentence in filler for each in sentence] + names + codes
    made = []
    for name, code in _some(rng, list(zip(names, codes)), queries):
        ask = (
            f"Question: What is the code of {name}, which the text above tells?\nAnswer: It is"
            if zero_shot
            else f"code of {name}:"
        )
        wrong = [other for other in codes if other != code] + _others(rng, [*words], code)
        made.append(_query(ask, code, wrong[: CHOICES - 1], len(set(words)), zero_shot))
    return Situation(context, made, {"depth": places[names[0]]} if difficulty == 1 else {})


def key_value(rng: random.Random, items: int, difficulty: int, zero_shot: bool, queries: int) -> Situation:
    """Keys with values of ``difficulty`` words; tell the value of one key."""
    keys = distinct_words(rng, max(items, CHOICES), 3)
    values = {key: " ".join(word(rng, 2) for _ in range(difficulty)) for key in keys}
    line = "The value of {} is {}.\n" if zero_shot else "{} = {}\n"
    told = tuple(line.format(key, value) for key, value in values.items())
    made = []
    for key in _some(rng, keys, queries):
        ask = f"Question: What is the value of {key}?\nAnswer: It is" if zero_shot else f"get {key} ="
        answer = values[key]
        wrong = _others(rng, list(values.values()), answer)
        made.append(_query(ask, answer, wrong, len(set(values.values())), zero_shot))
    return Situation("".join(told), made, {"pairs": len(keys)}, items=told)


def multi_hop(rng: random.Random, items: int, difficulty: int, zero_shot: bool, queries: int) -> Situation:
    """Chains of words, one link a line, all lines shuffled; go ``difficulty`` links on from a word.

    Chains have one link more than asked for, so that the end of a chain is not the answer.
    """
    length = difficulty + 2
    chains = max(2, items)
    words = distinct_words(rng, chains * length, 3)
    held = [words[at * length : (at + 1) * length] for at in range(chains)]
    links = [link for chain in held for link in zip(chain, chain[1:])]
    rng.shuffle(links)
    line = "{} leads to {}.\n" if zero_shot else "{} > {}\n"
    context = "".join(line.format(*link) for link in links)
    made = []
    for chain in _some(rng, held, queries):
        start, answer = chain[0], chain[difficulty]
        ask = (
            f"Question: Where does one arrive who starts at {start} and goes {difficulty} links on?\nAnswer: At"
            if zero_shot
            else f"{difficulty} on from {start}:"
        )
        wrong = [other for other in chain[1:] if other != answer][: CHOICES - 2]
        wrong += _others(rng, [other[difficulty] for other in held], answer)
        # whoever has understood how far to go, but not from where, chooses among the chains
        made.append(_query(ask, answer, wrong[: CHOICES - 1], len(held), zero_shot))
    return Situation(context, made, {"chains": chains})


CONTEXT_TASKS = {
    task.name: task
    for task in (
        ContextTask("memorize", "long-context memorizing", "words to tell after the cue", memorize),
        ContextTask("multi-round", "multi-round memorizing", "times each name is set", multi_round, "rounds"),
        ContextTask("icl", "in-context learning of a map", "pairs of labels", in_context_learning, "shots"),
        ContextTask("needle", "find a needle", "codes hidden in the text", needle),
        ContextTask("key-value", "key-value retrieval", "words per value", key_value, "pairs"),
        ContextTask("multi-hop", "multi-hop retrieval", "links to follow", multi_hop),
    )
}
COUNTED = {name: task.counted for name, task in CONTEXT_TASKS.items() if task.counted}
"""What the items of a task are called, where their number can be asked for (--num-pairs)."""
