"""Whether two tokenizers give the same ids, tried on generated texts.

A handful of samples proves little: tokenizers part at single characters (normalisation), at white space, at pieces that
span words, and at symbols of their own. So the texts are generated, the same ones on every run: all assigned characters
but the bulk of the ideographs and Hangul syllables, composed and decomposed; white space and control characters in
every position; the vocabulary's own pieces, next to each other and apart; its symbols among letters; and long texts.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.data.tokenizers import Tokenizer

PARAGRAPH = (
    "The memory of a model need not lie where its arithmetic is done. A token that looks up thirty-two rows of a table "
    "with a million of them reads as much from a table of ten million; so the table may grow, and what one step moves "
    "stays the same. In 2025 a baker in Łódź, who kept his recipes in a ledger of 1 200 pages, put it like this: “I "
    "never read the book – I read the page.” Whether he was right depends on the index: def find(page): return "
    "ledger[page % 1200]  # and nothing else.\n\n\tThe rest follows: cost = rows × width, as 32 × 192 = 6 144.\n"
)
"""Plain English with a few other characters, code and white space; our own."""

_SAMPLES = (
    PARAGRAPH,
    "",
    " ",
    "   leading and trailing   ",
    "tabs\tand\nline feeds\r\n\r\n\n",
    "Numbers 0123456789 3.14159 1e-5 0x7F -42 (1,234,567)",
    "def f(x):\n    return {'a': [x, x**2], \"b\": None}\n",
    "Größe, naïve café, Ελληνικά, русский язык, 日本語のテキスト, 한국어, العربية, עברית, हिन्दी",
    "emoji 👩‍🔬🏳️‍🌈 and combining e\u0301 a\u030a, ligature \ufb01, wide \uff21\uff22, nbsp\u00a0here, zero\u200bwidth",
    "\u0001\u001f\u007f control characters \ufeff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!----------------",
    "x" * 300 + " " * 50 + "\n" * 20,
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\dir\\file.txt",
    "<0x41> <0x0A><0xE2> <0x4",
)
# SentencePiece's mark of a space, which docs/hugging-face.md names as a known difference; NUL, which no corpus has.
_LEFT_OUT = ("\u2581", "\x00")
_LARGE_SCRIPTS = ("CJK UNIFIED", "HANGUL SYLLABLE", "TANGUT", "KHITAN", "NUSHU")
_SHOWN = 120


@dataclass(frozen=True)
class Words:
    """What the texts take from a vocabulary: ``pieces`` as they stand in texts, ``symbols`` that are never split."""

    pieces: Sequence[str] = ()
    symbols: Sequence[str] = ()


def texts(words: Words) -> Iterator[str]:
    """All texts, about 3,000 of them with 200,000 characters."""
    draw = random.Random(0)
    yield from _SAMPLES
    yield from _symbols(words.symbols, draw)
    yield from _white_space_and_control(draw)
    yield from _characters(draw)
    pieces = [piece for piece in words.pieces if not any(character in piece for character in _LEFT_OUT)]
    yield from _phrases(draw.sample(pieces, min(len(pieces), 4000)), draw)
    ordinary = PARAGRAPH.split() + ["zażółć", "δοκιμή", "naïve", "x_1", "==", "12", "日本", "\t", "\u00a0", "\n"]
    lines = ["".join(draw.choice([" ", "  ", ""]) + draw.choice(ordinary) for _ in range(12)) for _ in range(300)]
    yield from lines
    yield "\n".join([PARAGRAPH * 4, *lines, *draw.sample(pieces, min(len(pieces), 300))])


def _symbols(symbols: Sequence[str], draw: random.Random) -> Iterator[str]:
    for symbol in draw.sample(list(symbols), min(len(symbols), 500)):
        yield f"{symbol}|a{symbol}|{symbol}a| {symbol} | a {symbol} a|  {symbol}  |{symbol}{symbol}|\n{symbol}\n"
        yield symbol
        yield f"{symbol} word"
        yield f" word {symbol}"


def _white_space_and_control(draw: random.Random) -> Iterator[str]:
    spaces = [chr(code) for code in range(1, 0x110000) if chr(code).isspace()] + ["\u200b", "\ufeff", "\u2060"]
    controls = [chr(code) for code in [*range(1, 32), *range(127, 160), 0xAD, *range(0x200B, 0x2010), 0xFE0F]]
    for character in [*spaces, *controls]:
        yield character
        yield f"{character}a {character} a{character}{character}b  {character}  c{character}"
    plain = [" ", "  ", "   ", "a", "b"]
    for _ in range(300):
        yield "".join(draw.choice([*plain, draw.choice(spaces), draw.choice(controls)]) for _ in range(9))


def _characters(draw: random.Random) -> Iterator[str]:
    """Assigned characters in the order of their numbers, which keeps scripts together, and in any order."""
    kept: list[str] = []
    for code in range(33, 0x110000):
        character = chr(code)
        if unicodedata.category(character) in ("Cn", "Cs", "Co", "Cc") or character in _LEFT_OUT:
            continue
        if not unicodedata.name(character, "").startswith(_LARGE_SCRIPTS) or draw.random() < 0.02:
            kept.append(character)
    for start in range(0, len(kept), 24):
        group = kept[start : start + 24]
        yield "".join(group)
        if (apart := unicodedata.normalize("NFD", "".join(group))) != "".join(group):
            yield apart
    common = [character for character in kept if ord(character) < 0x3000]
    for _ in range(200):
        yield "".join(draw.choice(common) for _ in range(20))


def _phrases(pieces: list[str], draw: random.Random) -> Iterator[str]:
    draw.shuffle(pieces)
    for start in range(0, len(pieces), 8):
        yield draw.choice(["", "", " "]).join(pieces[start : start + 8])


def check_same_ids(
    tokenizer: Tokenizer, text: str, words: Words, tie: Callable[[list[int], list[int]], bool] | None = None
) -> tuple[int, int]:
    """Compare the ids of ``tokenizer`` with those of a tokenizer.json (its content: ``text``) on all texts.

    ``tie`` says of two lists of ids for one text whether the tokenizer holds them equally good, so that rounding
    decides. Returns how many texts were compared, and in how many of them only such ties differ. Raises
    ``ConversionError`` for any other difference, which shows the shortest part of the text that was found to differ.
    """
    import tokenizers

    exported = tokenizers.Tokenizer.from_str(text)

    def pair(sample: str) -> tuple[list[int] | None, list[int] | None]:
        # transformers asks for special tokens; the file must not add any
        return _ids(tokenizer.tokenize, sample), _ids(lambda each: exported.encode(each).ids, sample)

    def differs(sample: str) -> bool:
        own, other = pair(sample)
        return own != other and not (tie is not None and own is not None and other is not None and tie(own, other))

    count = ties = 0
    for sample in texts(words):
        count += 1
        own, other = pair(sample)
        if own == other:
            continue
        if not differs(sample):
            ties += 1
            continue
        part = _shortest(sample, differs)
        own, other = pair(part)
        raise ConversionError(
            f"the tokenizer cannot be exported with the same ids: the text '{_escaped(part)}' gives {_few(own)} in "
            f"training and {_few(other)} in the export; give --no-tokenizer, and use the run's own tokenizer"
        )
    return count, ties


def _ids(encode: Callable[[str], Any], text: str) -> list[int] | None:
    """The ids of a text; None where the tokenizer has none for it (a word that it lacks)."""
    try:
        return list(encode(text))
    except Exception:  # the tokenizers library raises plain Exception
        return None


def _shortest(text: str, differs: Callable[[str], bool]) -> str:
    """``text`` without what can be taken away, from either end, so that it still differs."""
    size = len(text) // 2
    while size:
        if differs(text[size:]):
            text = text[size:]
        elif differs(text[:-size]):
            text = text[:-size]
        else:
            size //= 2
        size = min(size, len(text) // 2 if len(text) > 1 else 0)
    return text


def _escaped(text: str) -> str:
    shown = text[:_SHOWN].encode("unicode_escape").decode("ascii")
    return shown + ("..." if len(text) > _SHOWN else "")


def _few(ids: list[int] | None) -> str:
    if ids is None:
        return "no ids"
    return str(ids) if len(ids) <= 8 else f"{len(ids)} ids from {ids[:8]}".replace("]", ", ...]")
