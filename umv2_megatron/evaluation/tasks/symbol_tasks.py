"""The six context tasks in symbols of one token each, for models of a few layers; ``SYMBOL_TASKS`` has them.

In words of several tokens a model must first learn to spell before it can learn to look up. Here a document is a symbol
that names the task, a context, a question mark, and questions with their answers, all of them symbols between spaces:

    key-value    @key-value k v k v ... ? k v k v           a question is a key
    memorize     @memorize s s s ... ? s s s s s s          two neighbours, and what followed them
    multi-round  @multi-round k v k v ? k v . k v ... ? k v  the last value of a name; asked on the way, too
    icl          @icl x s y x s y ... ? x s y x s y         y follows from x, whatever s is
    needle       @needle s s s # k v s s s ... ? k v        the pair behind the sign
    multi-hop    @multi-hop a b d e b c ... ? 2 a c         so many links on

Symbols have no meaning of their own: which value belongs to a key is drawn anew in every document. Most of a document
is drawn at random, what is asked for included, and a model that is taught to predict that as well learns late or never
to answer; so ``loss_marks`` tells which tokens are answers. What is asked has the form of what was told: small models
learn that a value follows its key, and signs between the two are in the way (docs/evaluation.md).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from umv2_megatron.evaluation.tasks.base import CHOICES, Document, Query, Situation
from umv2_megatron.evaluation.tasks.context_tasks import CONTEXT_TASKS

SYMBOLS = tuple(f"s{number}" for number in range(256))
QUESTION, SIGN, STOP, END = "?", "#", ".", "<|endoftext|>"
MOST_LINKS = 9


def write_tokenizer(path: Path) -> None:
    """A tokenizer.json with a token for each symbol and mark, for --tokenizer-type HuggingFaceTokenizer."""
    import tokenizers

    numbers = map(str, range(1, MOST_LINKS + 1))
    words = [END, QUESTION, SIGN, STOP, *numbers, *(task_symbol(name) for name in CONTEXT_TASKS), *SYMBOLS]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([END])
    made.save(str(path))


def loss_marks(document: Document) -> str:
    """A mark for each token of a document, for --loss-mask-key: 1 for those of answers, 0 for the others."""
    told = document.context.split()
    marks = [int(after == STOP) for after in [*told[1:], ""]]  # an answer on the way ends with a stop
    for query in document.queries:
        marks += [0] * len(query.prompt.split()) + [1] * len(query.answer.split())
    return " ".join(map(str, marks))


def task_symbol(name: str) -> str:
    """The word that documents of a task begin with."""
    return "@" + name


def _text(words: Sequence[str]) -> str:
    return "".join(f" {word}" for word in words)


def _context(name: str, told: str) -> str:
    return task_symbol(name) + told + _text([QUESTION])


def _distinct(rng: random.Random, count: int) -> list[str]:
    """Raises ``ValueError`` naming the flags of a task that can ask for too many."""
    if count > len(SYMBOLS):
        raise ValueError(
            f"--difficulty and --context-lengths (--lengths of make_tasks.py) ask for {count} different symbols; "
            f"expected at most {len(SYMBOLS)}: give a lower difficulty or length"
        )
    return rng.sample(SYMBOLS, count)


def _others(rng: random.Random, values: Sequence[str], answer: str) -> tuple[str, ...]:
    different = [value for value in dict.fromkeys(values) if value != answer]
    return tuple(f" {each}" for each in rng.sample(different, min(len(different), CHOICES - 1)))


def _query(prompt: Sequence[str], answer: str, wrong: tuple[str, ...], candidates: int) -> Query:
    return Query(_text(prompt), f" {answer}", wrong, candidates)


def key_value(rng: random.Random, items: int, difficulty: int, _: bool, queries: int) -> Situation:
    """Keys with values of ``difficulty`` symbols."""
    keys = _distinct(rng, max(items, 2))
    values = {key: " ".join(rng.choices(SYMBOLS, k=difficulty)) for key in keys}
    told = tuple(f" {key} {value}" for key, value in values.items())
    context = _context("key-value", "".join(told))
    known = list(values.values())
    made = [
        _query([key], values[key], _others(rng, known, values[key]), len(set(known)))
        for key in rng.sample(keys, min(queries, len(keys)))
    ]
    return Situation(context, made, {"pairs": len(keys)}, task_symbol("key-value"), told)


def memorize(rng: random.Random, items: int, difficulty: int, _: bool, queries: int) -> Situation:
    """A passage; given two neighbours that occur once, tell the ``difficulty`` symbols after them."""
    count = max(items, difficulty + CHOICES + 2)
    queries = min(queries, max(1, count // 4))
    once: list[int] = []
    while not once:  # hardly ever drawn again: pairs of 256 symbols repeat in long passages only
        words = rng.choices(SYMBOLS, k=count)
        cues = list(zip(words, words[1:]))
        times = Counter(cues)
        once = [at for at in range(count - difficulty - 1) if times[cues[at]] == 1]
    spans = [" ".join(words[at + 2 : at + 2 + difficulty]) for at in range(count - difficulty - 1)]
    made = [
        _query(cues[at], spans[at], _others(rng, spans, spans[at]), len(set(spans)))
        for at in rng.sample(once, min(queries, len(once)))
    ]
    return Situation(_context("memorize", _text(words)), made)


def multi_round(rng: random.Random, items: int, difficulty: int, _: bool, queries: int) -> Situation:
    """Names are set to values, each ``difficulty`` times on average; the last value counts. Every third round asks."""
    names = _distinct(rng, min(max(2, items // difficulty), len(SYMBOLS)))
    told = max(items, len(names) * difficulty)
    order = names + rng.choices(names, k=told - len(names))
    rng.shuffle(order)
    values: dict[str, list[str]] = {name: [] for name in names}
    rounds, words = [], []
    for number, name in enumerate(order):
        values[name].append(rng.choice(SYMBOLS))
        rounds.append(f" {name} {values[name][-1]}")
        words += [name, values[name][-1]]
        if number % 2:
            asked = rng.choice([known for known in names if values[known]])
            words += [QUESTION, asked, values[asked][-1], STOP]
    everything = [value for name in names for value in values[name]]
    final = {values[name][-1] for name in names}
    made = []
    for asked in rng.sample(names, min(queries, len(names))):
        answer = values[asked][-1]
        earlier = [f" {old}" for old in dict.fromkeys(values[asked]) if old != answer][-2:]
        wrong = (*earlier, *_others(rng, everything, answer))[: CHOICES - 1]
        made.append(_query([asked], answer, wrong, len(final)))
    context = _context("multi-round", _text(words))
    return Situation(context, made, {"rounds": len(order)}, task_symbol("multi-round"), tuple(rounds))


def in_context_learning(rng: random.Random, items: int, difficulty: int, _: bool, queries: int) -> Situation:
    """Examples x s y: x decides on the label y, two of x for each of 2 x ``difficulty`` labels; s is any symbol."""
    half = len(SYMBOLS) // 2
    labels = rng.sample(SYMBOLS[half:], min(2 * difficulty, half))
    kinds = rng.sample(SYMBOLS[:half], min(2 * len(labels), half))
    rule = {kind: labels[index % len(labels)] for index, kind in enumerate(kinds)}
    shown = kinds[: len(labels)] + rng.choices(kinds, k=max(0, items - len(labels)))  # every label is shown
    rng.shuffle(shown)
    told = tuple(f" {kind} {rng.choice(SYMBOLS[:half])} {rule[kind]}" for kind in shown)
    seen = sorted(set(shown))
    made = []
    for kind in rng.choices(seen, k=min(queries, len(shown))):
        wrong = _others(rng, labels, rule[kind])
        made.append(_query([kind, rng.choice(SYMBOLS[:half])], rule[kind], wrong, len({rule[each] for each in seen})))
    return Situation(_context("icl", "".join(told)), made, {"shots": len(shown)}, task_symbol("icl"), told)


def needle(rng: random.Random, items: int, difficulty: int, _: bool, queries: int) -> Situation:
    """Random symbols with ``difficulty`` pairs behind a sign among them; tell the second of one pair."""
    names, codes = _distinct(rng, difficulty), rng.choices(SYMBOLS, k=difficulty)
    words = rng.choices(SYMBOLS, k=max(items, CHOICES))
    places = {}
    for name, code in zip(names, codes):
        at = rng.randint(0, len(words))
        words.insert(at, f"{SIGN} {name} {code}")
        places[name] = round(at / (len(words) - 1), 3)
    everything = " ".join(words).replace(SIGN, " ").split()
    made = [
        _query([name], code, _others(rng, everything, code), len(set(everything)))
        for name, code in rng.sample(list(zip(names, codes)), min(queries, difficulty))
    ]
    details = {"depth": places[names[0]]} if difficulty == 1 else {}
    return Situation(_context("needle", _text(words)), made, details)


def multi_hop(rng: random.Random, items: int, difficulty: int, _: bool, queries: int) -> Situation:
    """Chains of symbols, their links shuffled; go ``difficulty`` links on. A chain has one link more than that.

    A document of several questions asks for fewer links, too: two links are learned on top of one.
    """
    if difficulty > MOST_LINKS:
        raise ValueError(f"--difficulty holds {difficulty}; multi-hop in symbols takes at most {MOST_LINKS} links")
    length, chains = difficulty + 2, max(2, items)
    words = _distinct(rng, chains * length)
    held = [words[at * length : (at + 1) * length] for at in range(chains)]
    links = [link for chain in held for link in zip(chain, chain[1:])]
    rng.shuffle(links)
    context = _context("multi-hop", _text([f"{one} {next_one}" for one, next_one in links]))
    made = []
    asked = [(chain, hops) for hops in range(1 if queries > 1 else difficulty, difficulty + 1) for chain in held]
    for chain, hops in rng.sample(asked, min(queries, len(asked))):
        near = tuple(f" {other}" for other in chain[1:] if other != chain[hops])[: CHOICES - 2]
        wrong = near + _others(rng, [other[hops] for other in held], chain[hops])
        made.append(_query([str(hops), chain[0]], chain[hops], wrong[: CHOICES - 1], chains))
    return Situation(context, made, {"chains": chains})


_BUILDS: dict[str, Callable[[random.Random, int, int, bool, int], Situation]] = {
    "memorize": memorize,
    "multi-round": multi_round,
    "icl": in_context_learning,
    "needle": needle,
    "key-value": key_value,
    "multi-hop": multi_hop,
}
SYMBOL_TASKS = {
    name: replace(task, build=_BUILDS[name]) for name, task in CONTEXT_TASKS.items()
}
