"""Which token ids n-grams take for one: bytes, pieces with and without a space in front, control tokens."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from umv2_megatron.data.canonical_ids import canonical_ids, folded
from umv2_megatron.data.tokenizers import ByteLevelTokenizer, Tokenizer

PIECES = [
    "Apple", " apple", "APPLE", "\u00e1pple", "pear", " ", "\n", "\ufffd", "", "a b", "a  b", "\ufffd", "",
    "\ufb01n", "fin", "\u0301",
]  # fmt: skip


class _Pieces(Tokenizer):
    """A tokenizer of ``PIECES``, and two ids that it does not have."""

    def __init__(self) -> None:
        super().__init__(len(PIECES) + 2, 8, "")
        self.num_tokens = len(PIECES)

    def detokenize(self, ids: Iterable[int]) -> str:
        return "".join(PIECES[number] for number in ids)


def test_case_accents_and_spaces_around_do_not_count() -> None:
    found = canonical_ids(_Pieces())
    assert found == [0, 0, 0, 0, 4, 5, 5, 7, 8, 9, 9, 11, 12, 13, 13, 15, 16, 17]


def test_bytes() -> None:
    tokenizer = ByteLevelTokenizer()
    found = canonical_ids(tokenizer)
    assert len(found) == tokenizer.vocab_size and all(one <= token for token, one in enumerate(found))
    assert found[ord("a")] == found[ord("A")] == ord("A") and found[ord("\n")] == found[ord(" ")] == ord("\t")
    assert found[128:] == list(range(128, tokenizer.vocab_size))  # parts of characters, and the end of document


@pytest.mark.parametrize("text", ["", " ", "\t \n", "\u0301", "\u0130", "\u1e9e"])
def test_folding_is_stable(text: str) -> None:
    assert folded(folded(text)) == folded(text)
