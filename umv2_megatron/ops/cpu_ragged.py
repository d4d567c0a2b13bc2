"""The compiled loops of ``cpu.py`` for picks in a list: ``interface.RaggedParts``."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from umv2_megatron.ops import cpu, ragged
from umv2_megatron.ops.cpu import Picks


def pre_scores(rows: Tensor, tokens: Tensor, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``interface.RaggedParts``."""
    if not cpu.supports(pre_values):
        return ragged.pre_scores(rows, tokens, projected, pre_values, dtype)
    return cpu.flat_pre_scores(Picks(rows, None, tokens), projected, pre_values, dtype)


def weighted_sum(
    rows: Tensor,
    blocks: Optional[Tensor],
    tokens: Tensor,
    counts: Tensor,
    weights: Tensor,
    values: Tensor,
    num_blocks: int,
) -> Tensor:
    """See ``interface.RaggedParts``."""
    if not cpu.supports(values):
        return ragged.weighted_sum(rows, blocks, tokens, counts, weights, values, num_blocks)
    picks = Picks(rows, blocks if num_blocks > 1 else None, tokens)
    return cpu.flat_weighted_sum(picks, counts.shape[0], weights, values, num_blocks)


def weighted_sum_backward(
    rows: Tensor,
    blocks: Optional[Tensor],
    tokens: Tensor,
    weights: Tensor,
    grad_out: Tensor,
    values: Tensor,
    value_sum: Optional[Tensor],
) -> Tensor:
    """See ``interface.RaggedParts``."""
    if not cpu.supports(values, value_sum):
        return ragged.weighted_sum_backward(rows, blocks, tokens, weights, grad_out, values, value_sum)
    picks = Picks(rows, blocks if grad_out.shape[1] > 1 else None, tokens)
    return cpu.flat_weighted_sum_backward(picks, weights, grad_out, values, value_sum)


def pre_scores_backward(
    rows: Tensor,
    tokens: Tensor,
    rho_grad: Tensor,
    projected: Tensor,
    pre_values: Tensor,
    pre_value_sum: Optional[Tensor],
) -> Tensor:
    """See ``interface.RaggedParts``."""
    if not cpu.supports(pre_values, pre_value_sum):
        return ragged.pre_scores_backward(rows, tokens, rho_grad, projected, pre_values, pre_value_sum)
    picks = Picks(rows, None, tokens)
    return cpu.flat_pre_scores_backward(picks, rho_grad, projected, pre_values, pre_value_sum)
