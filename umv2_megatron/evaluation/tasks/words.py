"""Made-up words and the random streams of examples.

Words are syllables of one consonant and one vowel, in lower-case ASCII, so that a byte-level model reads them as well
as any other, words of equal syllables have equal bytes, and hardly any of them means something. Every example has a
random stream of its own, named by purpose, task, seed and number: example 7 is the same however many are made, and
training and evaluation never share a stream, whatever the seeds.
"""

from __future__ import annotations

import random

CONSONANTS = "bdfghjklmnprstvz"
VOWELS = "aeiou"
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)


def stream(purpose: str, task: str, seed: int, number: int) -> random.Random:
    """The random numbers of one example. Python seeds from the text itself (SHA-512), the same on every machine."""
    return random.Random(f"umv2 {purpose} {task} {seed} {number}")


def word(rng: random.Random, syllables: int = 2) -> str:
    """One word of ``syllables`` syllables (80 to that power are possible)."""
    return "".join(rng.choice(SYLLABLES) for _ in range(syllables))


def most_words(syllables: int) -> int:
    """Different words of ``syllables`` syllables that are drawn at most: half of all, so that drawing stays fast."""
    return len(SYLLABLES) ** syllables // 2


def distinct_words(rng: random.Random, count: int, syllables: int = 2) -> list[str]:
    """``count`` different words, in the order drawn; the first ones do not depend on ``count``.

    Raises ``ValueError`` naming the flags of a task that can ask for too many.
    """
    if count > most_words(syllables):
        raise ValueError(
            f"--difficulty and --context-lengths (--lengths of make_tasks.py) ask for {count} different words of "
            f"{syllables} syllables; expected at most {most_words(syllables)}: give a lower difficulty or length"
        )
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(rng, syllables)] = None
    return list(found)
