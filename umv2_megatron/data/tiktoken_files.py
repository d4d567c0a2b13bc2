"""Vocabularies of tiktoken: which bytes have which id, which tokens are special, and how texts are cut into words.

Two kinds of files are read. Megatron-LM's ``.json`` is a list of {"rank", "token_bytes" (base64), "token_str"} that
begins with the 256 bytes; special tokens have the first ids (1,000 by default, of which seven have names), and ranks
follow. A ``.tiktoken`` file has a line "<base64> <rank>" for each token; ranks are ids, and special tokens follow the
largest, or have the ids that are given. mcore (tokenizers/text/libraries/tiktoken_tokenizer.py) reads the first kind
alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import NamedTuple, Optional

PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""The two patterns of mcore, by the names of --tiktoken-pattern; they decide ids, and so are the same here."""

NAMED = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_SPECIAL = 1000
_MOST = 1 << 17
_IDS = 1 << 31  # token files hold int32


class TikTokenSettings(NamedTuple):
    """The flags of a TikTokenizer beside --tokenizer-model; None stands for a flag that is not given."""

    pattern: Optional[str] = None
    num_special_tokens: Optional[int] = None
    special_tokens: Optional[tuple[str, ...]] = None


NO_SETTINGS = TikTokenSettings()


class Vocabulary(NamedTuple):
    """``ranks``: ids of byte strings; ``special``: ids of special tokens; ``sha256``: of all that decides ids."""

    ranks: dict[bytes, int]
    special: dict[str, int]
    pattern: str
    sha256: str


def read_vocabulary(path: str, data: bytes, settings: TikTokenSettings, vocab_size: Optional[int]) -> Vocabulary:
    """``vocab_size``: with a .json the ids that are kept, 131,072 at most if None, as in Megatron-LM.

    Raises ``ValueError`` naming the flag.
    """
    try:
        if path.endswith(".json"):
            ranks, special = _of_json(data, settings, vocab_size)
            pattern = settings.pattern or "v2"
        else:
            ranks, special = _of_lines(data, settings)
            if settings.pattern is None:
                raise ValueError(
                    "--tiktoken-pattern is missing: a .tiktoken file does not say how texts are cut into words; "
                    "expected v1, v2 or the regular expression that belongs to the vocabulary"
                )
            pattern = settings.pattern
    except (UnicodeDecodeError, KeyError, TypeError, _Wrong) as error:
        reason = str(error) if isinstance(error, _Wrong) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"--tokenizer-model {path} is no vocabulary of tiktoken ({reason}): expected Megatron's .json or lines of "
            "base64 and rank"
        ) from None
    pattern = PATTERNS.get(pattern, pattern)
    settled = json.dumps([pattern, special, len(ranks)], sort_keys=True)
    return Vocabulary(ranks, special, pattern, hashlib.sha256(data + settled.encode()).hexdigest())


class _Wrong(Exception):
    pass


def _id_of(digits: str) -> Optional[int]:
    """None for what is no id."""
    return int(digits) if digits.isdecimal() and len(digits) < 20 and int(digits) < _IDS else None


def _bytes_of(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise _Wrong(f"{text[:40]!r} is not base64") from None


def _of_json(data: bytes, settings: TikTokenSettings, vocab_size: Optional[int]) -> tuple[dict, dict]:
    try:
        entries = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _Wrong(str(error)) from None
    if not isinstance(entries, list):
        raise _Wrong("expected a list")
    count = _SPECIAL if settings.num_special_tokens is None else settings.num_special_tokens
    names = settings.special_tokens or NAMED
    if len(set(names)) < len(names):
        raise ValueError(f"--tokenizer-special-tokens {' '.join(names)} names a token twice: list every token once")
    if missing := sorted(set(NAMED) - set(names)):
        raise ValueError(f"--tokenizer-special-tokens lacks {missing[0]}: expected {' '.join(NAMED)} among them")
    if not len(names) <= count < (vocab_size or _MOST):
        raise ValueError(
            f"--tiktoken-num-special-tokens is {count}: expected {len(names)} or more, and fewer than the vocabulary "
            f"has ({vocab_size or _MOST})"
        )
    special = {name: i for i, name in enumerate([*names, *(f"<SPECIAL_{i}>" for i in range(len(names), count))])}
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(entries[: (vocab_size or _MOST) - count]):
        token = _bytes_of(entry["token_bytes"])
        if entry["rank"] != rank or (rank < 256 and token != bytes([rank])):
            raise _Wrong(f"entry {rank} is rank {entry['rank']}, or not the byte that it should be")
        ranks[token] = rank + count
    if len(ranks) < min(len(entries), (vocab_size or _MOST) - count):
        raise _Wrong("two entries hold the same bytes")
    if len(ranks) < 256:
        raise _Wrong(f"{len(ranks)} entries are read, which are not all bytes")
    return ranks, special


def _of_lines(data: bytes, settings: TikTokenSettings) -> tuple[dict, dict]:
    if settings.num_special_tokens is not None:
        raise ValueError(
            "--tiktoken-num-special-tokens is for Megatron's .json: the special tokens of a .tiktoken file are those "
            "of --tokenizer-special-tokens"
        )
    ranks: dict[bytes, int] = {}
    for at, line in enumerate(data.decode("ascii").splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split()
        if len(parts) != 2 or _id_of(parts[1]) is None:
            raise _Wrong(f"line {at} is not base64 and rank")
        ranks[_bytes_of(parts[0])] = int(parts[1])
    if len(set(ranks.values())) < len(ranks) or not all(bytes([i]) in ranks for i in range(256)):
        raise _Wrong("a rank stands twice, or a byte has none")
    special: dict[str, int] = {}
    after = max(ranks.values()) + 1
    for given in settings.special_tokens or ():
        name, equals, number = given.rpartition("=")
        if not (equals and name and number.isdecimal()):
            name, number = given, str(after)
        if _id_of(number) is None:
            raise ValueError(f"--tokenizer-special-tokens gives {name} the id {number}: expected one below {_IDS}")
        if name in special:
            raise ValueError(f"--tokenizer-special-tokens names {name} twice: list every token once")
        special[name] = int(number)
        after = int(number) + 1
    taken = {i: token for token, i in ranks.items()}
    for name, i in special.items():
        if i in taken:
            raise ValueError(f"--tokenizer-special-tokens gives {name} the id {i}, a rank of the file: give another")
    if len(set(special.values())) < len(special):
        raise ValueError("--tokenizer-special-tokens gives two tokens one id: expected an id for each")
    return ranks, special
