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

from umv2_megatron.ops.interface import ListedPicks
from umv2_megatron.ops.scatter import CHUNK_ELEMENTS


@torch.no_grad()
def pre_scores(picks: ListedPicks, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``interface.RaggedParts``."""
    rows, tokens = picks.rows, picks.tokens
    rho = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    for part in _chunks(rows, pre_values):
        rho[part] = (functional.embedding(rows[part], pre_values) * projected[tokens[part]]).sum(-1)
    return rho


@torch.no_grad()
def pre_scores_backward(
    picks: ListedPicks, rho_grad: Tensor, projected: Tensor, pre_values: Tensor, pre_value_sum: Optional[Tensor]
) -> Tensor:
    """See ``interface.RaggedParts``. The sum over a token's picks is kept in the dtype of ``rho_grad``."""
    projected_grad = torch.zeros(projected.shape, dtype=rho_grad.dtype, device=projected.device)
    for part in _chunks(picks.rows, pre_values):
        grad = rho_grad[part].unsqueeze(-1)
        rows, owners = picks.rows[part], picks.tokens[part]
        projected_grad.index_add_(0, owners, grad * functional.embedding(rows, pre_values).to(grad.dtype))
        if pre_value_sum is not None:
            rows_grad = grad * projected[owners].to(grad.dtype)
            pre_value_sum.index_add_(0, rows, rows_grad.to(pre_value_sum.dtype))
    return projected_grad.to(projected.dtype)


@torch.no_grad()
def weighted_sum(picks: ListedPicks, weights: Tensor, values: Tensor) -> Tensor:
    """See ``interface.RaggedParts``."""
    num_tokens, num_blocks, cores = picks.counts.shape[0], picks.num_blocks, weights.shape[1]
    weights = weights.to(values.dtype)
    if num_blocks == 1:
        # One bag per token, for each core, over the table seen as [A * C, Dc]: core c of row a is row a * C + c.
        slices = values.detach().view(values.shape[0] * cores, -1)
        starts = picks.counts.cumsum(0) - picks.counts
        sums = [
            functional.embedding_bag(
                picks.rows * cores + core, slices, starts, per_sample_weights=weights[:, core].contiguous(), mode="sum"
            )
            for core in range(cores)
        ]
        return torch.cat(sums, dim=1)
    assert picks.blocks is not None
    out = torch.zeros(num_tokens * num_blocks, values.shape[1], dtype=weights.dtype, device=values.device)
    places = picks.tokens * num_blocks + picks.blocks
    for part in _chunks(picks.rows, values):
        picked = functional.embedding(picks.rows[part], values).view(-1, cores, values.shape[1] // cores)
        out.index_add_(0, places[part], (picked * weights[part].unsqueeze(-1)).flatten(1))
    return out.view(num_tokens, num_blocks * values.shape[1])


@torch.no_grad()
def weighted_sum_backward(
    picks: ListedPicks, weights: Tensor, grad_out: Tensor, values: Tensor, value_sum: Optional[Tensor]
) -> Tensor:
    """See ``interface.RaggedParts``."""
    cores = weights.shape[1]
    flat = grad_out.reshape(-1, values.shape[1])
    places = picks.tokens if picks.blocks is None else picks.tokens * picks.num_blocks + picks.blocks
    weight_grad = torch.empty_like(weights)
    for part in _chunks(picks.rows, values):
        upstream = flat[places[part]].to(weights.dtype).view(-1, cores, values.shape[1] // cores)
        rows = picks.rows[part]
        picked = functional.embedding(rows, values).to(weights.dtype).view_as(upstream)
        weight_grad[part] = (picked * upstream).sum(-1)
        if value_sum is not None:
            rows_grad = (weights[part].unsqueeze(-1) * upstream).flatten(1)
            value_sum.index_add_(0, rows, rows_grad.to(value_sum.dtype))
    return weight_grad


def _chunks(rows: Tensor, table: Tensor) -> Iterator[slice]:
    """Slices of the picks ``rows`` [n], each with CHUNK_ELEMENTS elements of ``table`` picked at most."""
    size = max(1, CHUNK_ELEMENTS["cuda" if rows.is_cuda else "cpu"] // table.shape[1])
    for start in range(0, rows.shape[0], size):
        yield slice(start, start + size)
