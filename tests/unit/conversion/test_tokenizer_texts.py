"""The texts that tokenizers are compared on: what they cover, and how a difference is shown."""

from __future__ import annotations

import unicodedata

import pytest

from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.conversion.tokenizer_files import _byte_level
from umv2_megatron.conversion.tokenizer_texts import Words, check_same_ids, texts
from umv2_megatron.data.tokenizers import ByteLevelTokenizer


def test_what_the_texts_cover():
    made = list(texts(Words(["piece", "other"], ["<a b>"])))
    assert made == list(texts(Words(["piece", "other"], ["<a b>"]))), "the texts depend on more than the vocabulary"
    present = set("".join(made))
    for code in range(1, 0x110000):
        character = chr(code)
        category = unicodedata.category(character)
        name = unicodedata.name(character, "")
        if category in ("Cn", "Cs", "Co") or character == "\u2581" or " IDEOGRAPH" in name or "SYLLABLE" in name:
            continue
        if name.startswith(("TANGUT", "KHITAN", "NUSHU")):
            continue
        assert character in present, f"U+{code:04X} {name}"
    assert not {"\u2581", "\x00"} & present
    whole = "\x00".join(made)
    for part in ("\x00 ", " \x00", "\r\n", "e\u0301", "U\u0308\u030c", "a<a b>", "<a b> word", "<0x41>"):
        assert part in whole, ascii(part)
    assert "piece" in whole and max(map(len, made)) > 5000


def test_a_difference_is_shown_by_its_shortest_text_escaped():
    class Other(ByteLevelTokenizer):
        def tokenize(self, text):
            return [9 if i > 32 and text[at - 1 : at + 1] == "\u0308\u030c" else i
                    for at, character in enumerate(text) for i in character.encode()]  # fmt: skip

    with pytest.raises(ConversionError) as error:
        check_same_ids(Other(), _byte_level().to_str(), Words())
    assert str(error.value) == (
        "the tokenizer cannot be exported with the same ids: the text '\\u0308\\u030c' gives [204, 136, 9, 9] in "
        "training and [204, 136, 204, 140] in the export; give --no-tokenizer, and use the run's own tokenizer"
    )


def test_texts_that_neither_tokenizer_knows_are_the_same():
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0}))

    class Own(ByteLevelTokenizer):
        def tokenize(self, text):
            return words.encode(text).ids

    count, ties = check_same_ids(Own(), words.to_str(), Words())
    assert count > 2000 and ties == 0


def test_ties_are_counted_and_no_difference():
    class Own(ByteLevelTokenizer):
        def tokenize(self, text):
            return [65 if text == " " else i for i in super().tokenize(text)]

    assert check_same_ids(Own(), _byte_level().to_str(), Words(), lambda own, other: own == [65])[1] == 2
