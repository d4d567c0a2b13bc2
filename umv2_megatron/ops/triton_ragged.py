"""Parts of the Triton lookup for picks that lie in a list: ``ragged.py`` on a GPU.

Everything is without autograd; gradients of tables are added to buffers, in a fixed order unless ``deterministic`` is
False. Letters: n picks in all, sorted by token, T tokens, C cores, E virtual blocks, A rows here, Dp, Dv.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor

from umv2_megatron.ops import triton_launch as launches
from umv2_megatron.ops.interface import ListedPicks
from umv2_megatron.ops.triton_launch import PickList
from umv2_megatron.ops.triton_lookup import _pre_scores_backward, _weighted_sum_backward


@torch.no_grad()
def pre_scores(picks: ListedPicks, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``interface.RaggedParts``."""
    exact = launches.exact_dtype(pre_values)
    return launches.row_dots(_rows(picks), projected.contiguous(), pre_values, 1, exact).view(-1).to(dtype)


@torch.no_grad()
def pre_scores_backward(
    picks: ListedPicks,
    rho_grad: Tensor,
    projected: Tensor,
    pre_values: Tensor,
    pre_value_sum: Optional[Tensor],
    deterministic: bool = True,
) -> Tensor:
    """See ``interface.RaggedParts``."""
    owned = replace(_rows(picks), starts=_starts(picks))
    return _pre_scores_backward(owned, rho_grad, projected, pre_values, pre_value_sum, deterministic, picks.order)


@torch.no_grad()
def weighted_sum(picks: ListedPicks, weights: Tensor, values: Tensor) -> Tensor:
    """See ``interface.RaggedParts``."""
    exact = weights.to(launches.exact_dtype(weights, values)).contiguous()
    return launches.row_sums(replace(_cells(picks), starts=_starts(picks)), exact, values)


@torch.no_grad()
def weighted_sum_backward(
    picks: ListedPicks,
    weights: Tensor,
    grad_out: Tensor,
    values: Tensor,
    value_sum: Optional[Tensor],
    deterministic: bool = True,
) -> Tensor:
    """See ``interface.RaggedParts``."""
    return _weighted_sum_backward(_cells(picks), weights, grad_out, values, value_sum, deterministic, picks.order)


def _rows(picks: ListedPicks) -> PickList:
    """For pre-values, which know no blocks."""
    return PickList(picks.rows, None, picks.counts.shape[0], 1, owners=picks.tokens)


def _cells(picks: ListedPicks) -> PickList:
    return replace(_rows(picks), blocks=picks.blocks, num_blocks=picks.num_blocks)


def _starts(picks: ListedPicks) -> Tensor:
    """Where the picks of each token start, [T + 1]."""
    return torch.cat([picks.counts.new_zeros(1), picks.counts.cumsum(0)])
