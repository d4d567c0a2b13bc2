"""Which tokens the loss counts, where it counts answers only.

A corpus of questions and answers, or of conversations, marks what the model is to say. What a user says is read, but
the model is not taught to say it. Either two tokens of the text are the marks (--loss-start-token, --loss-stop-token):
an answer stands behind a start token and ends with a stop token or the document. Or a second corpus holds a mark for
each token (--loss-mask-key).
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from umv2_megatron.config.data_config import DataConfig, marks_prefix
from umv2_megatron.data.indexing import Index, check_offsets, read_index, read_tokens
from umv2_megatron.data.tokenizers import Tokenizer, id_of_flag


class ScoredTokens(NamedTuple):
    """Ids of the tokens that begin and end what is scored; without ``stop`` only ``eod``, the end of a document, ends
    it."""

    start: int
    stop: Optional[int]
    eod: int

    def mask(self, tokens: Tensor) -> Tensor:
        """[n] float32 for ``tokens`` [n] int64, the inputs of a sample: 1 where the loss of the next token counts.

        Scored is what follows a start token, the stop or end-of-document token behind it included. At the beginning of
        a sample nothing is, until a start token comes: of an answer that began in another sample the question is
        missing.
        """
        places = torch.arange(1, len(tokens) + 1)
        ends = tokens == self.eod
        if self.stop is not None:
            ends |= tokens == self.stop
        last_start = torch.cummax(places * (tokens == self.start), 0).values
        last_end = torch.cummax(places * ends, 0).values
        return (last_start > last_end).float()


def scored_tokens(config: DataConfig, tokenizer: Tokenizer) -> Optional[ScoredTokens]:
    """None without --loss-start-token. Raises ``ValueError`` naming the flag of a token that the tokenizer has not."""
    if config.loss_start_token is None:
        return None
    start = id_of_flag("--loss-start-token", config.loss_start_token, tokenizer)
    stop = None
    if config.loss_stop_token is not None:
        stop = id_of_flag("--loss-stop-token", config.loss_stop_token, tokenizer)
    for flag, token, number, other in (
        ("--loss-start-token", config.loss_start_token, start, tokenizer.eod),
        ("--loss-stop-token", config.loss_stop_token, stop, start),
    ):
        if number == other:
            what = "the end-of-document token" if other == tokenizer.eod else "--loss-start-token"
            raise ValueError(f"{flag} is {token!r}, with the id {number} of {what}: expected another token")
    return ScoredTokens(start, stop, tokenizer.eod)


COUNTS = 1
"""The mark of a token whose loss counts; any other number leaves it out."""
_BLOCK = 1 << 20


def check_marks(prefix: str, index: Index, key: str) -> None:
    """Raise ``ValueError`` where the marks of a corpus are missing or damaged, are not one for each token, or let none
    count. Marks are read up to the first that counts."""
    marks = marks_prefix(prefix, key)
    try:
        held = read_index(marks)
        check_offsets(marks, held)
    except ValueError as error:
        raise ValueError(f"--loss-mask-key {key}: {error}") from None
    if not np.array_equal(held.lengths, index.lengths):
        count = min(len(held.lengths), len(index.lengths))
        differs = np.flatnonzero(held.lengths[:count] != index.lengths[:count])
        where = f"document {differs[0]} differs" if len(differs) else "one has more documents"
        raise ValueError(
            f"--loss-mask-key {key}: {marks} has not one mark for each token of {prefix} ({where}); write both from "
            "the same lines, and give --append-eod to both or to neither"
        )
    tokens = read_tokens(marks, held)
    if not any(np.any(tokens[at : at + _BLOCK] == COUNTS) for at in range(0, len(tokens), _BLOCK)):
        raise ValueError(
            f"--loss-mask-key {key}: {marks} has no {COUNTS}, so that no token of {prefix} would count; expected a "
            f"{COUNTS} for each token whose loss counts and any other number for the others"
        )
