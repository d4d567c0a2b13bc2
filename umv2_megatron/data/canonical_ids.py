"""Which token ids are one for n-grams: those whose texts differ in case, accents and white space around them alone.

The map of Engram (arXiv 2601.07372, "tokenizer compression"): a token is known by its text in Unicode's NFKC form,
without accents, in lower case, with runs of white space as one space and none at the ends. Tokens without a text of
their own (control tokens, parts of a character) stay apart.
"""

from __future__ import annotations

import re
import unicodedata

from umv2_megatron.data.tokenizers import Tokenizer

_UNFINISHED = "\ufffd"


def canonical_ids(tokenizer: Tokenizer) -> list[int]:
    """For each id below ``tokenizer.vocab_size`` the smallest id that counts as the same token."""
    first: dict[str, int] = {}
    found = []
    for token in range(tokenizer.vocab_size):
        text = tokenizer.detokenize([token]) if token < tokenizer.num_tokens else ""
        alone = not text or _UNFINISHED in text
        found.append(token if alone else first.setdefault(folded(text), token))
    return found


def folded(text: str) -> str:
    """``text`` in the form in which n-grams know it; white space alone is one space."""
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    plain = "".join(letter for letter in decomposed if unicodedata.category(letter) != "Mn").lower()
    joined = re.sub(r"[ \t\r\n]+", " ", plain)
    return joined.strip() or joined or text
