"""The compiled loops of ``cpu.py`` for picks in a list: ``interface.RaggedParts``."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from umv2_megatron.ops import cpu, ragged
from umv2_megatron.ops.cpu import Picks, or_plain
from umv2_megatron.ops.interface import ListedPicks


@or_plain(ragged, "pre_values")
def pre_scores(picks: ListedPicks, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``interface.RaggedParts``."""
    return cpu.flat_pre_scores(Picks(picks.rows, None, picks.tokens), projected, pre_values, dtype)


@or_plain(ragged, "values")
def weighted_sum(picks: ListedPicks, weights: Tensor, values: Tensor) -> Tensor:
    """See ``interface.RaggedParts``."""
    flat = Picks(picks.rows, picks.blocks, picks.tokens)
    return cpu.flat_weighted_sum(flat, picks.counts.shape[0], weights, values, picks.num_blocks)


@or_plain(ragged, "values", "value_sum")
def weighted_sum_backward(
    picks: ListedPicks, weights: Tensor, grad_out: Tensor, values: Tensor, value_sum: Optional[Tensor]
) -> Tensor:
    """See ``interface.RaggedParts``."""
    flat = Picks(picks.rows, picks.blocks, picks.tokens)
    return cpu.flat_weighted_sum_backward(flat, weights, grad_out, values, value_sum)


@or_plain(ragged, "pre_values", "pre_value_sum")
def pre_scores_backward(
    picks: ListedPicks, rho_grad: Tensor, projected: Tensor, pre_values: Tensor, pre_value_sum: Optional[Tensor]
) -> Tensor:
    """See ``interface.RaggedParts``."""
    flat = Picks(picks.rows, None, picks.tokens)
    return cpu.flat_pre_scores_backward(flat, rho_grad, projected, pre_values, pre_value_sum)
