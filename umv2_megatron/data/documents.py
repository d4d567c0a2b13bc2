"""Documents kept apart (--reset-attention-mask): where they begin in a micro-batch, and its packed form.

The samples of a micro-batch become one row of b * s tokens, with the places where documents begin beside it. Attention
looks at each document alone, and rotary positions count from 0 in each; no mask [s, s] exists. A sample begins a
document, too: the rest of one that began in another sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.utils.data import default_collate

STARTS = "cu_seqlens"


@dataclass
class Documents(PackedSeqParams):
    """mcore's description of packed sequences, with the same lengths on the host: reading them from a device would make
    every layer wait."""

    lengths: tuple[int, ...] = ()


def document_starts(tokens: Tensor, eod: int) -> Tensor:
    """Where documents begin among all tokens of ``tokens`` [b, s], and their number at the end: int32 [documents + 1].

    An end-of-document token is the last of its document, as in mcore's masks.
    """
    begins = torch.zeros(tokens.shape, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == eod
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([tokens.numel()])]).to(torch.int32)


def collate_documents(eod: int) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """What joins samples to a micro-batch in a data loader: as usual, with ``STARTS``, found where tokens are in host
    memory."""
    return _Collate(eod)


@dataclass
class _Collate:  # a class, because loaders that are spawned pickle it
    eod: int

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_collate(samples)
        return {**batch, STARTS: document_starts(batch["tokens"], self.eod)}


def packed(batch: dict[str, Tensor | None], starts: Tensor) -> dict[str, Any]:
    """``batch`` with tensors [b, s] as [1, b * s], and ``packed_seq_params`` from ``starts`` (host memory)."""
    lengths = tuple(starts.diff().tolist())
    rows = {name: None if tensor is None else tensor.reshape(1, -1) for name, tensor in batch.items()}
    device = next(tensor.device for tensor in rows.values() if tensor is not None)
    starts = starts.to(device, non_blocking=True)
    documents = Documents(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
    )
    return {**rows, "packed_seq_params": documents}
