"""Fill-in-the-middle: documents of a sample rearranged so that the model learns to fill a gap (--fim-rate).

A document without its end is cut at two random places into prefix, middle and suffix, and becomes

    PSM:  <prefix> prefix <suffix> suffix <middle> middle        (prefix, suffix, middle)
    SPM:  <prefix> <suffix> suffix <middle> prefix middle        (suffix, prefix, middle)

with three sentinel tokens (Bavarian et al. 2022, arXiv 2207.14255; the forms are those of Megatron-LM's GPTFIMDataset).
Here the cuts fall between tokens, so that taking the sentinels out and putting the parts in order gives the document's
own tokens; Megatron-LM cuts between characters, and tokenizes the parts again.

A sample keeps its length: it holds the documents from its beginning, and what the sentinels push out at its end is left
out. The last document is cut before it is rearranged, so every document that is rearranged has all three sentinels.
Everything follows from the seed, the corpus and the number of the sample: a resumed run, and any number of ranks and
loading processes, sees the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import numpy as np

from umv2_megatron.config.data_config import DataConfig
from umv2_megatron.data.tokenizers import Tokenizer, id_of_flag


class Infilling(NamedTuple):
    """``rate``: share of documents that are rearranged; ``spm_rate``: share of those that become SPM; ids of sentinels
    and of the end of documents."""

    rate: float
    spm_rate: float
    prefix: int
    middle: int
    suffix: int
    eod: int


def infilling_of(config: DataConfig, tokenizer: Tokenizer) -> Optional[Infilling]:
    """None without --fim-rate. Raises ``ValueError`` naming the flag of a sentinel that is no token of its own."""
    if not config.fim_rate:
        return None
    ids: dict[int, str] = {tokenizer.eod: "the end-of-document token"}
    for flag, token in (
        ("--fim-prefix-token", config.fim_prefix_token),
        ("--fim-middle-token", config.fim_middle_token),
        ("--fim-suffix-token", config.fim_suffix_token),
    ):
        assert token is not None, "DataConfig.validate was not called"
        number = id_of_flag(flag, token, tokenizer)
        if number in ids:
            raise ValueError(f"{flag} is {token!r}, with the id {number} of {ids[number]}: expected a token of its own")
        ids[number] = flag
    _, prefix, middle, suffix = ids
    return Infilling(config.fim_rate, config.fim_spm_rate, prefix, middle, suffix, tokenizer.eod)


def draws_of(seed: int, corpus: str, sample: int) -> np.random.Philox:
    """Random numbers of one sample. ``corpus``: the fingerprint of its files, in hexadecimal digits.

    Only ``random_raw`` is used, whose numbers NumPy keeps the same in all versions, as it does SeedSequence's.
    """
    return np.random.Philox(np.random.SeedSequence([seed, int(corpus[:16] or "0", 16), sample]))


def infill(sample: np.ndarray, options: Infilling, draws: Any) -> np.ndarray:
    """``sample`` [n] int64 with documents rearranged, again [n]. Padding at its end (ids below 0) stays.

    ``draws``: a bit generator with ``random_raw``; four numbers are taken for each document.
    """
    padding = sample[sample < 0]
    tokens = sample[: len(sample) - len(padding)]
    ends = np.flatnonzero(tokens == options.eod)
    parts: list[np.ndarray] = []
    room = len(tokens)
    begin = 0
    for end in [*ends.tolist(), len(tokens)]:
        document, tail = tokens[begin:end], tokens[end : end + 1]
        begin = end + 1
        chance, order, one, other = draws.random_raw(4).tolist()
        if len(document) and _share(chance) < options.rate and room > 3:
            if len(document) + 3 + len(tail) > room:
                document, tail = document[: room - 3], tail[:0]
            first, second = sorted((one % (len(document) + 1), other % (len(document) + 1)))
            found = _rearranged(document, first, second, _share(order) < options.spm_rate, options)
        else:
            found = [document]
        for part in (*found, tail):
            parts.append(part[:room])
            room -= len(parts[-1])
        if not room:
            break
    return np.concatenate([*parts, padding])


def _share(number: int) -> float:
    """64 random bits as a number from 0 up to 1."""
    return (number >> 11) * 2.0**-53


def _rearranged(document: np.ndarray, first: int, second: int, spm: bool, options: Infilling) -> list[np.ndarray]:
    prefix, middle, suffix = document[:first], document[first:second], document[second:]
    begins, gap, after = (np.array([i], np.int64) for i in (options.prefix, options.middle, options.suffix))
    if spm:
        return [begins, after, suffix, gap, prefix, middle]
    return [begins, prefix, after, suffix, gap, middle]
