"""The two-stage search on NVIDIA GPUs: the kernels of ``triton_topk.py``, and PyTorch for what they leave.

Scores of 16 bits are converted where they are read. float64 scores take the plain functions, because the kernels sort
64-bit words that hold a float32 score and a place. The scores of the picked cells are a few elements per pick: plain
PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from umv2_megatron.ops import search, triton_topk
from umv2_megatron.ops.search import cell_scores

READS_HALVES = True

__all__ = ["best_cells", "best_keys", "cell_scores"]


def best_keys(key_scores: Tensor, u: Tensor, t: Tensor, kept: int) -> Tensor:
    """See ``interface.Search``."""
    chosen = search if key_scores.dtype == torch.float64 else triton_topk
    return chosen.best_keys(key_scores, u, t, kept)


def best_cells(key_scores: Tensor, keys: Tensor, cores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """See ``interface.Search``."""
    chosen = search if key_scores.dtype == torch.float64 else triton_topk
    return chosen.best_cells(key_scores, keys, cores, topk)
