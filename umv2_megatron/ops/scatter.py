"""The parts of a lookup in plain PyTorch, on any device: embedding_bag forward, index_add_ into the tables' gradients.

The backward walks over the tokens in chunks whose picked rows fit the cache. ``whole_table.py`` makes a differentiable
lookup of the parts; ``ragged.py`` has them for picks in a list.

Letters as in ``interface.py``; Dc = Dv / C. On a CPU all sums run in a fixed order, so results are repeatable bit by
bit; on a GPU ``index_add_`` is atomic and needs torch's deterministic mode (--deterministic-mode) for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional

from umv2_megatron.ops.interface import PickOrder, pre_value_scores

# Elements picked per chunk of tokens. CPU: 128 tokens of 32 picks and 192 float32 columns are 3 MB, which stays in
# cache. Elsewhere a chunk only bounds the memory of the picked rows (256 MB in float32).
CHUNK_ELEMENTS = {"cpu": 128 * 32 * 192, "cuda": 1 << 26}


@torch.no_grad()
def pre_scores(rows: Tensor, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``interface.GridParts``."""
    rho = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    for part in _chunks(rows, pre_values):
        rho[part] = pre_value_scores(rows[part], projected[part], pre_values)
    return rho


@torch.no_grad()
def weighted_sum(rows: Tensor, blocks: Optional[Tensor], weights: Tensor, values: Tensor, num_blocks: int) -> Tensor:
    """See ``interface.GridParts``."""
    tokens, picks = rows.shape
    cores = weights.shape[-1]
    width = values.shape[1] // cores
    weights = weights.to(values.dtype)
    if num_blocks == 1:
        # One bag per token and core, over the table seen as [A * C, Dc]: core c of row a is row a * C + c.
        bags = rows.unsqueeze(1) * cores + torch.arange(cores, device=rows.device).view(1, cores, 1)
        return functional.embedding_bag(
            bags.reshape(tokens * cores, picks),
            values.detach().view(values.shape[0] * cores, width),
            per_sample_weights=weights.transpose(1, 2).reshape(tokens * cores, picks),
            mode="sum",
        ).view(tokens, values.shape[1])
    assert blocks is not None
    # [T * C, E, P] @ [T * C, P, Dc]: each block sees the weights of its own picks and zeros elsewhere.
    own = functional.one_hot(blocks, num_blocks).to(weights.dtype)
    by_block = torch.einsum("tpc,tpe->tcep", weights, own).flatten(0, 1)
    slices = functional.embedding(rows, values).view(tokens, picks, cores, width).transpose(1, 2).flatten(0, 1)
    summed = torch.bmm(by_block, slices).view(tokens, cores, num_blocks, width)
    return summed.transpose(1, 2).reshape(tokens, num_blocks * values.shape[1])


@torch.no_grad()
def weighted_sum_backward(
    rows: Tensor,
    blocks: Optional[Tensor],
    weights: Tensor,
    grad_out: Tensor,
    values: Tensor,
    value_sum: Optional[Tensor],
    order: Optional[PickOrder] = None,
) -> Tensor:
    """See ``interface.GridParts``."""
    weight_grad = torch.empty_like(weights)
    for part in _chunks(rows, values):
        upstream = _upstream_of_picks(grad_out[part], blocks[part] if blocks is not None else None, weights.dtype)
        weight_grad[part] = _weight_gradient(rows[part], upstream, values, weights)
        if value_sum is not None:
            _add_value_gradient(value_sum, rows[part], upstream, weights[part])
    return weight_grad


@torch.no_grad()
def pre_scores_backward(
    rows: Tensor, rho_grad: Tensor, projected: Tensor, pre_values: Tensor, pre_value_sum: Optional[Tensor],
    order: Optional[PickOrder] = None,
) -> Tensor:  # fmt: skip
    """See ``interface.GridParts``."""
    projected_grad = torch.empty_like(projected)
    for part in _chunks(rows, pre_values):
        projected_grad[part] = _pre_value_gradients(
            rows[part], rho_grad[part], projected[part], pre_values, pre_value_sum
        )
    return projected_grad


def _chunks(rows: Tensor, table: Tensor) -> Iterator[slice]:
    """Slices of the tokens of ``rows`` [T, P], each with CHUNK_ELEMENTS elements of ``table`` picked at most."""
    elements = CHUNK_ELEMENTS["cuda" if rows.is_cuda else "cpu"]
    size = max(1, elements // (rows.shape[1] * table.shape[1]))
    for start in range(0, rows.shape[0], size):
        yield slice(start, start + size)


def _upstream_of_picks(grad_out: Tensor, blocks: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """The output gradient that each pick sees: [t, 1 or P, Dv], from ``grad_out`` [t, E, Dv]."""
    if grad_out.shape[1] > 1:
        assert blocks is not None
        index = blocks.unsqueeze(-1).expand(-1, -1, grad_out.shape[2])
        grad_out = grad_out.gather(1, index)
    return grad_out.to(dtype)


def _weight_gradient(rows: Tensor, upstream: Tensor, values: Tensor, scores: Tensor) -> Tensor:
    """Gradient of the weights, [t, P, C]: the dot product of each row's slices with the output gradient."""
    tokens, picks = rows.shape
    cores = scores.shape[-1]
    picked = functional.embedding(rows, values).to(upstream.dtype)
    if upstream.shape[1] > 1:
        return (picked * upstream).reshape(tokens, picks, cores, -1).sum(-1)
    # One product per token, [P, Dv] @ [Dv, C] with zeros outside each core's slice: cheaper than cutting the rows up.
    own = torch.eye(cores, dtype=upstream.dtype, device=upstream.device).view(1, cores, 1, cores)
    return torch.bmm(picked, (upstream.view(tokens, cores, -1, 1) * own).reshape(tokens, -1, cores))


def _add_value_gradient(value_sum: Tensor, rows: Tensor, upstream: Tensor, weights: Tensor) -> None:
    """Add weights[t, p, c] * upstream[t, p, slice c] to row rows[t, p] of ``value_sum``."""
    tokens, picks = rows.shape
    cores = weights.shape[-1]
    split = upstream.view(tokens, -1, cores, upstream.shape[-1] // cores)
    rows_grad = (weights.unsqueeze(-1) * split).reshape(tokens * picks, -1)  # with Dc = 1 in any memory layout
    value_sum.index_add_(0, rows.flatten(), rows_grad.to(value_sum.dtype))


def _pre_value_gradients(
    rows: Tensor, rho_grad: Tensor, projected: Tensor, pre_values: Tensor, pre_value_sum: Optional[Tensor]
) -> Tensor:
    """Gradient of ``projected`` [t, Dp]; that of the picked pre-value rows is added to ``pre_value_sum``."""
    picked = functional.embedding(rows, pre_values)
    if pre_value_sum is not None:
        rows_grad = rho_grad.unsqueeze(-1) * projected.to(rho_grad.dtype).unsqueeze(1)
        pre_value_sum.index_add_(0, rows.flatten(), rows_grad.flatten(0, 1).to(pre_value_sum.dtype))
    return torch.bmm(rho_grad.to(picked.dtype).unsqueeze(1), picked).squeeze(1)
