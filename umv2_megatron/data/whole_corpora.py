"""Every token of some corpora, once, in windows of the training length: for --full-validation.

mcore's datasets draw a number of samples from shuffled documents, and leave out what fills no sample. Here the parts
of the corpora follow each other, each as one stream: the first window begins with an end-of-document token, which is
before a document in training, too, and each later one with the last token of the window before. The last window of a
part reaches back until it is full; tokens that it has in common with the one before bear no loss again. What a part
shorter than a window lacks, and the windows that fill the last batch, bear none either. ``evaluation/text_loss.py``
reads streams in the same windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from torch.utils.data import Dataset

from umv2_megatron.config.data_config import DataConfig, marks_prefix
from umv2_megatron.data.indexing import Index, read_index, read_tokens
from umv2_megatron.data.scored_tokens import COUNTS, ScoredTokens


@dataclass(frozen=True)
class CorpusPart:
    """The sequences ``first`` to ``end`` - 1 of the corpus ``prefix``."""

    prefix: str
    first: int
    end: int


class WholeCorpora(Dataset):
    """Windows of ``parts``; items are those of mcore's GPT datasets: ``tokens``, ``labels``, ``position_ids``
    ([seq_length] int64), ``loss_mask`` ([seq_length] float32) and, if asked for, ``attention_mask``.

    Args:
        parts: what is read.
        config: how positions, attention and losses are masked.
        eod: the end-of-document token.
        seq_length: targets of a window.
        scored: which tokens bear a loss (None: all).
        multiple: the number of windows is filled up to a multiple of this with windows that bear no loss.
    """

    def __init__(self, parts: Sequence[CorpusPart], config: DataConfig, eod: int, seq_length: int, multiple: int,
                 scored: Optional[ScoredTokens] = None):  # fmt: skip
        self._scored = scored
        self._parts, self._config, self._eod, self._length = list(parts), config, eod, seq_length
        self._ends: list[np.ndarray] = []  # per part: tokens up to the end of each sequence
        # per part: the tokens' prefix and index, and those of their marks
        self._tokens_at: list[tuple[str, Index]] = []
        self._marks_at: list[tuple[str, Index]] = []
        windows = [0]
        for part in self._parts:
            index = read_index(part.prefix)
            self._tokens_at.append((part.prefix, index))
            if config.loss_mask_key is not None:
                marks = marks_prefix(part.prefix, config.loss_mask_key)
                self._marks_at.append((marks, read_index(marks)))
            self._ends.append(np.cumsum(index.lengths[part.first : part.end], dtype=np.int64))
            windows.append(windows[-1] + -(-self._tokens_of(len(windows) - 1) // seq_length))
        self._first_windows = windows
        self._size = -(-windows[-1] // multiple) * multiple
        self._pad = 0 if eod else 1

    @property
    def tokens(self) -> int:
        """Tokens of all parts."""
        return sum(self._tokens_of(place) for place in range(len(self._parts)))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        text = np.full(self._length + 1, self._pad, dtype=np.int64)
        scored, counts = slice(0, 0), torch.ones(self._length)
        if number < self._first_windows[-1]:
            place = int(np.searchsorted(self._first_windows, number, side="right")) - 1
            begin, tokens_here = (number - self._first_windows[place]) * self._length, self._tokens_of(place)
            start = max(0, min(begin, tokens_here - self._length))
            count = min(self._length, tokens_here - start)
            text[0] = self._eod if start == 0 else self._read(self._tokens_at, place, start - 1, 1)[0]
            text[1 : count + 1] = self._read(self._tokens_at, place, start, count)
            scored = slice(begin - start, count)
            if self._marks_at:
                counts[:count] = torch.from_numpy(self._read(self._marks_at, place, start, count) == COUNTS)
        tokens, labels = torch.from_numpy(text[:-1].copy()), torch.from_numpy(text[1:].copy())
        config = self._config
        attention_mask, loss_mask, position_ids = _get_ltor_masks_and_position_ids(
            tokens,
            self._eod,
            config.reset_position_ids,
            config.reset_attention_mask and not config.packs_documents,
            config.eod_mask_loss,
            config.create_attention_mask_in_dataloader,
        )
        if self._scored is not None:
            loss_mask = loss_mask * self._scored.mask(tokens)
        loss_mask = loss_mask * counts
        loss_mask[: scored.start], loss_mask[scored.stop :] = 0.0, 0.0
        item = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
        if config.create_attention_mask_in_dataloader:
            item["attention_mask"] = attention_mask
        return item

    def _tokens_of(self, place: int) -> int:
        ends = self._ends[place]
        return int(ends[-1]) if len(ends) else 0

    def _read(self, corpora: Sequence[tuple[str, Index]], place: int, begin: int, count: int) -> np.ndarray:
        """``count`` tokens of a part from its token ``begin`` on, or marks, by where ``corpora`` has them."""
        part, ends = self._parts[place], self._ends[place]
        prefix, index = corpora[place]
        tokens = read_tokens(prefix, index)
        found: list[np.ndarray] = []
        at = int(np.searchsorted(ends, begin, side="right"))
        while count:
            start = int(ends[at - 1]) if at else 0
            sequence = part.first + at
            offset = int(index.offsets[sequence]) // index.dtype.itemsize + begin - start
            taken = min(count, int(ends[at]) - begin)
            found.append(np.asarray(tokens[offset : offset + taken]))
            begin, count, at = begin + taken, count - taken, at + 1
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def corpus_parts(config: DataConfig, split: str, prefixes: Sequence[str] | None) -> list[CorpusPart]:
    """What --full-validation reads of ``prefixes``; None: the ``split`` ("validation" or "test") that --split leaves
    of the corpora of --data-path, by mcore's rounding."""
    if prefixes is not None:
        return [CorpusPart(prefix, 0, len(read_index(prefix).lengths)) for prefix in prefixes]
    blend, shares = config.blend(), config.split_shares()
    assert blend is not None, "no corpora"
    place = ("train", "validation", "test").index(split)
    begin, end = sum(shares[:place]), sum(shares[: place + 1])
    parts = []
    for prefix in blend[0]:
        count = len(read_index(prefix).lengths)
        parts.append(CorpusPart(prefix, round(begin * count), round(end * count)))
    return parts
