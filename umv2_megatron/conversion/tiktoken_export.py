"""A vocabulary of tiktoken as a tokenizer of the tokenizers library."""

from __future__ import annotations

from typing import Any

from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.data.tiktoken_files import Vocabulary


def letters_of_bytes() -> dict[int, str]:
    """The characters by which byte-level tokenizers write bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def tokenizer_of(vocabulary: Vocabulary) -> Any:
    """tiktoken joins the two neighbours whose joint bytes have the lowest rank, however they are cut; so each way to
    cut a token into two tokens is a merge, with the token's rank. A word that is a token itself is taken whole by both.

    Raises ``ConversionError`` where a special token is written like another token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = letters_of_bytes()
    written = {token: "".join(letters[byte] for byte in token) for token in vocabulary.ranks}
    words = {written[token]: number for token, number in vocabulary.ranks.items()}
    for name in vocabulary.special:
        if name in words:
            raise ConversionError(f"the special token {name} has the text of another token: no export holds both")
    merges: list[tuple[str, str]] = []
    for token, _ in sorted(vocabulary.ranks.items(), key=lambda entry: entry[1]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(written[left], written[right]) for left, right in cuts if left in written and right in written]
    made = Tokenizer(models.BPE(vocab={**vocabulary.special, **words}, merges=merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(vocabulary.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in vocabulary.special])
    return made
