"""Parts of the Triton lookup for picks that lie in a list: ``ragged.py`` on a GPU, with the same signatures.

Everything is without autograd; gradients of tables are added to buffers, in a fixed order unless ``deterministic`` is
False. Letters: n picks in all, sorted by token, T tokens, C cores, E virtual blocks, A rows here, Dp, Dv.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from umv2_megatron.ops import triton_launch as launches
from umv2_megatron.ops.triton_launch import PickList
from umv2_megatron.ops.triton_lookup import _pre_scores_backward, _weighted_sum_backward


@torch.no_grad()
def pre_scores(rows: Tensor, tokens: Tensor, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """rho before its activation, [n] in ``dtype``.

    ``rows`` and ``tokens`` [n] int64, ``projected`` [T, Dp], ``pre_values`` [A, Dp].
    """
    picks = PickList(rows, None, projected.shape[0], 1, owners=tokens)
    exact = launches.exact_dtype(pre_values)
    return launches.row_dots(picks, projected.contiguous(), pre_values, 1, exact).view(-1).to(dtype)


@torch.no_grad()
def pre_scores_backward(
    rows: Tensor,
    tokens: Tensor,
    rho_grad: Tensor,
    projected: Tensor,
    pre_values: Tensor,
    pre_value_sum: Optional[Tensor],
    deterministic: bool = True,
) -> Tensor:
    """From the gradient of rho [n] to that of ``projected`` [T, Dp]; the table's is added to ``pre_value_sum``."""
    count = projected.shape[0]
    # Sorted tokens say where each token's picks start, without a count that the host would have to know.
    starts = torch.searchsorted(tokens, torch.arange(count + 1, device=tokens.device))
    picks = PickList(rows, None, count, 1, owners=tokens, starts=starts)
    return _pre_scores_backward(picks, rho_grad, projected, pre_values, pre_value_sum, deterministic)


@torch.no_grad()
def weighted_sum(
    rows: Tensor,
    blocks: Optional[Tensor],
    tokens: Tensor,
    counts: Tensor,
    weights: Tensor,
    values: Tensor,
    num_blocks: int,
) -> Tensor:
    """The sum at the top of ``ragged.py``, [T, E * Dv] in the dtype of ``values``; ``counts`` [T] int64 says how many
    picks each token has, ``weights`` is [n, C], ``blocks`` [n] or None when E is 1."""
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    blocks = blocks if num_blocks > 1 else None
    picks = PickList(rows, blocks, counts.shape[0], num_blocks, owners=tokens, starts=starts)
    exact = weights.to(launches.exact_dtype(weights, values)).contiguous()
    return launches.row_sums(picks, exact, values)


@torch.no_grad()
def weighted_sum_backward(
    rows: Tensor,
    blocks: Optional[Tensor],
    tokens: Tensor,
    weights: Tensor,
    grad_out: Tensor,
    values: Tensor,
    value_sum: Optional[Tensor],
    deterministic: bool = True,
) -> Tensor:
    """From the gradient of ``weighted_sum``'s result, [T, E, Dv], to that of ``weights`` [n, C]; the table's is
    added to ``value_sum``."""
    num_blocks = grad_out.shape[1]
    picks = PickList(rows, blocks if num_blocks > 1 else None, grad_out.shape[0], num_blocks, owners=tokens)
    return _weighted_sum_backward(picks, weights, grad_out, values, value_sum, deterministic)
