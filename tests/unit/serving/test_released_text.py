"""Text is released once no stop string can begin in it, however it is cut into tokens."""

from __future__ import annotations

import random

import pytest

from umv2_megatron.serving.released import ReleasedText, TokenLogprob


def detokenize(ids) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def released(text: str, stops: tuple[str, ...], offset: int = 0) -> tuple[list[str], list[TokenLogprob], bool]:
    """Parts, tokens and whether a stop string ended it, of a text that comes byte by byte."""
    under_test = ReleasedText(detokenize, list(b"before"), stops, offset)
    parts, tokens = [], []
    for byte in text.encode():
        part, ready = under_test.add(byte, TokenLogprob(chr(byte), True, -1.0, (), under_test.offset))
        parts.append(part)
        tokens += ready
        if under_test.stopped:
            return parts, tokens, True
    part, ready = under_test.end()
    return [*parts, part], tokens + ready, under_test.stopped


@pytest.mark.parametrize("seed", range(200))
def test_any_text_ends_before_the_first_stop_string(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("abé") for _ in range(draw.randrange(20)))
    stops = tuple("".join(draw.choice("abé") for _ in range(draw.randrange(1, 4))) for _ in range(draw.randrange(4)))
    ends = [text.find(stop) for stop in stops if stop in text]
    parts, tokens, stopped = released(text, stops)
    assert stopped == bool(ends)
    # of several stop strings the one that is complete first ends the text
    first = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    before = text if first is None else text[:first]
    expected = text if first is None else text[: min(before.find(stop) for stop in stops if stop in before)]
    assert "".join(parts) == expected
    assert [token.offset for token in tokens] == sorted(token.offset for token in tokens)
    assert len(tokens) == len(expected.encode())


def test_text_comes_at_once_where_no_stop_string_begins() -> None:
    assert released("xyz", ("ab",))[0] == ["x", "y", "z", ""]
    assert released("xaab", ("ab",))[0] == ["x", "", "a", ""]
    assert released("xa", ("ab",))[0] == ["x", "", "a"]


def test_offsets_count_the_characters_before() -> None:
    assert [token.offset for token in released("abc", (), 7)[1]] == [7, 8, 9]
