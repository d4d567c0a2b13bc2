"""Parts of the lookup for picks that lie in a list, not in a [T, P] grid: what a rank with some rows of a table gets.

    out[t, e, slice c] = sum over picks n with tokens[n] = t, blocks[n] = e of weights[n, c] * values[rows[n], slice c]

A token has any number of picks here, also none. Everything is without autograd; gradients of the tables are added to
buffers, as in ``scatter.py``. Letters: n picks in all, T tokens, C cores, E virtual blocks, A rows here, Dp, Dv.
Picks are sorted by token. Chunks bound the memory that picked rows take, as in ``scatter.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional

from umv2_megatron.ops.scatter import CHUNK_ELEMENTS


@torch.no_grad()
def pre_scores(rows: Tensor, tokens: Tensor, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """rho before its activation, [n] in ``dtype``.

    ``rows`` and ``tokens`` [n] int64, ``projected`` [T, Dp], ``pre_values`` [A, Dp].
    """
    rho = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    for part in _chunks(rows, pre_values):
        rho[part] = (functional.embedding(rows[part], pre_values) * projected[tokens[part]]).sum(-1)
    return rho


@torch.no_grad()
def pre_scores_backward(
    rows: Tensor,
    tokens: Tensor,
    rho_grad: Tensor,
    projected: Tensor,
    pre_values: Tensor,
    pre_value_sum: Optional[Tensor],
) -> Tensor:
    """From the gradient of rho [n] to that of ``projected`` [T, Dp]; the table's is added to ``pre_value_sum``.

    The sum over a token's picks is kept in the dtype of ``rho_grad``.
    """
    projected_grad = torch.zeros(projected.shape, dtype=rho_grad.dtype, device=projected.device)
    for part in _chunks(rows, pre_values):
        grad = rho_grad[part].unsqueeze(-1)
        picked, owners = rows[part], tokens[part]
        projected_grad.index_add_(0, owners, grad * functional.embedding(picked, pre_values).to(grad.dtype))
        if pre_value_sum is not None:
            rows_grad = grad * projected[owners].to(grad.dtype)
            pre_value_sum.index_add_(0, picked, rows_grad.to(pre_value_sum.dtype))
    return projected_grad.to(projected.dtype)


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
    """The sum at the top, [T, E * Dv] in the dtype of ``values``; ``counts`` [T] int64 says how many picks each token
    has, ``weights`` is [n, C], ``blocks`` [n] or None when E is 1."""
    num_tokens, cores = counts.shape[0], weights.shape[1]
    weights = weights.to(values.dtype)
    if num_blocks == 1:
        # One bag per token, for each core, over the table seen as [A * C, Dc]: core c of row a is row a * C + c.
        slices = values.detach().view(values.shape[0] * cores, -1)
        starts = counts.cumsum(0) - counts
        sums = [
            functional.embedding_bag(
                rows * cores + core, slices, starts, per_sample_weights=weights[:, core].contiguous(), mode="sum"
            )
            for core in range(cores)
        ]
        return torch.cat(sums, dim=1)
    assert blocks is not None
    out = torch.zeros(num_tokens * num_blocks, values.shape[1], dtype=weights.dtype, device=values.device)
    for part in _chunks(rows, values):
        picked = functional.embedding(rows[part], values).view(-1, cores, values.shape[1] // cores)
        weighted = (picked * weights[part].unsqueeze(-1)).flatten(1)
        out.index_add_(0, tokens[part] * num_blocks + blocks[part], weighted)
    return out.view(num_tokens, num_blocks * values.shape[1])


@torch.no_grad()
def weighted_sum_backward(
    rows: Tensor,
    blocks: Optional[Tensor],
    tokens: Tensor,
    weights: Tensor,
    grad_out: Tensor,
    values: Tensor,
    value_sum: Optional[Tensor],
) -> Tensor:
    """From the gradient of ``weighted_sum``'s result, [T, E, Dv], to that of ``weights`` [n, C]; the table's is
    added to ``value_sum``."""
    num_blocks, cores = grad_out.shape[1], weights.shape[1]
    flat = grad_out.reshape(-1, values.shape[1])
    places = tokens if blocks is None or num_blocks == 1 else tokens * num_blocks + blocks
    weight_grad = torch.empty_like(weights)
    for part in _chunks(rows, values):
        upstream = flat[places[part]].to(weights.dtype).view(-1, cores, values.shape[1] // cores)
        picked = functional.embedding(rows[part], values).to(weights.dtype).view_as(upstream)
        weight_grad[part] = (picked * upstream).sum(-1)
        if value_sum is not None:
            rows_grad = (weights[part].unsqueeze(-1) * upstream).flatten(1)
            value_sum.index_add_(0, rows[part], rows_grad.to(value_sum.dtype))
    return weight_grad


def _chunks(rows: Tensor, table: Tensor) -> Iterator[slice]:
    """Slices of the picks ``rows`` [n], each with CHUNK_ELEMENTS elements of ``table`` picked at most."""
    size = max(1, CHUNK_ELEMENTS["cuda" if rows.is_cuda else "cpu"] // table.shape[1])
    for start in range(0, rows.shape[0], size):
        yield slice(start, start + size)
