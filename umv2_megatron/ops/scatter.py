"""The lookup of choice: embedding_bag forward, and a backward that adds straight into the tables' ``main_grad``.

Why not autograd: a table has hundreds of megabytes, a micro-batch touches a small part of it, and the page faults of a
fresh dense gradient cost several times the arithmetic. So the backward walks over the tokens in chunks that fit the
cache and adds each picked row's gradient where mcore keeps gradients: ``main_grad``, a view of the DDP buffer.

``main_grad.py`` says how mcore learns of it.

Letters as in ``interface.py``; Dc = Dv / C. On a CPU all sums run in a fixed order, so results are repeatable bit by
bit; on a GPU ``index_add_`` is atomic and needs torch's deterministic mode (--deterministic-mode) for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from umv2_megatron.ops.interface import activate, activation_backward, pre_value_scores
from umv2_megatron.ops.main_grad import gradient_sum, hand_over

# Elements picked per chunk of tokens. CPU: 128 tokens of 32 picks and 192 float32 columns are 3 MB, which stays in
# cache. Elsewhere a chunk only bounds the memory of the picked rows (256 MB in float32).
CHUNK_ELEMENTS = {"cpu": 128 * 32 * 192, "cuda": 1 << 26}


def lookup(
    rows: Tensor,
    blocks: Optional[Tensor],
    scores: Tensor,
    projected: Optional[Tensor],
    pre_values: Optional[Tensor],
    values: Tensor,
    num_blocks: int,
    activation: str,
) -> Tensor:
    """See ``interface.TableLookup``."""
    assert num_blocks == 1 or blocks is not None, "several blocks need the block of each pick"
    assert (pre_values is None) == (projected is None), "pre-values and the projected input come together"
    return _Lookup.apply(rows, blocks, scores, projected, pre_values, values, num_blocks, activation)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        blocks: Optional[Tensor],
        scores: Tensor,
        projected: Optional[Tensor],
        pre_values: Optional[Tensor],
        values: Tensor,
        num_blocks: int,
        activation: str,
    ) -> Tensor:
        rho: Optional[Tensor] = None
        weights = scores
        if pre_values is not None and projected is not None:
            rho = pre_scores(rows, projected, pre_values, scores.dtype)
            weights = scores * activate(rho, activation).unsqueeze(-1)
        out = weighted_sum(rows, blocks, weights, values, num_blocks)
        # The tables are saved as attributes: they are parameters, and their main_grad must be found again.
        ctx.save_for_backward(rows, blocks, scores, projected, rho)
        ctx.pre_values, ctx.values = pre_values, values
        ctx.num_blocks, ctx.activation = num_blocks, activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        rows, blocks, scores, projected, rho = ctx.saved_tensors
        values, pre_values = ctx.values, ctx.pre_values
        needs = ctx.needs_input_grad
        value_sum = gradient_sum(values) if needs[5] else None
        pre_value_sum = gradient_sum(pre_values) if pre_values is not None and needs[4] else None
        score_grad = torch.empty_like(scores)
        projected_grad = torch.empty_like(projected) if projected is not None else None
        grad_out = grads[0].reshape(rows.shape[0], ctx.num_blocks, values.shape[1])

        for part in _chunks(rows, values):
            picked = rows[part]
            upstream = _upstream_of_picks(grad_out[part], blocks[part] if blocks is not None else None, scores.dtype)
            active = activate(rho[part], ctx.activation).unsqueeze(-1) if rho is not None else None
            weights = scores[part] * active if active is not None else scores[part]
            weight_grad = _weight_gradient(picked, upstream, values, scores)
            score_grad[part] = weight_grad * active if active is not None else weight_grad
            if value_sum is not None:
                _add_value_gradient(value_sum, picked, upstream, weights)
            if rho is not None and projected_grad is not None:
                rho_grad = activation_backward((weight_grad * scores[part]).sum(-1), rho[part], ctx.activation)
                projected_grad[part] = _pre_value_gradients(
                    picked, rho_grad, projected[part], pre_values, pre_value_sum
                )

        return (
            None,
            None,
            score_grad if needs[2] else None,
            projected_grad if needs[3] else None,
            hand_over(pre_values, pre_value_sum),
            hand_over(values, value_sum),
            None,
            None,
        )


def _chunks(rows: Tensor, table: Tensor) -> Iterator[slice]:
    """Slices of the tokens of ``rows`` [T, P], each with CHUNK_ELEMENTS elements of ``table`` picked at most."""
    elements = CHUNK_ELEMENTS["cuda" if rows.is_cuda else "cpu"]
    size = max(1, elements // (rows.shape[1] * table.shape[1]))
    for start in range(0, rows.shape[0], size):
        yield slice(start, start + size)


def weighted_sum(rows: Tensor, blocks: Optional[Tensor], weights: Tensor, values: Tensor, num_blocks: int) -> Tensor:
    """The weighted sum of ``interface.TableLookup`` given the final ``weights`` [T, P, C]."""
    tokens, picks = rows.shape
    cores = weights.shape[-1]
    weights = weights.to(values.dtype)
    if num_blocks == 1:
        # One bag per token and core, over the table seen as [A * C, Dc]: core c of row a is row a * C + c.
        bags = rows.unsqueeze(1) * cores + torch.arange(cores, device=rows.device).view(1, cores, 1)
        return functional.embedding_bag(
            bags.reshape(tokens * cores, picks),
            values.detach().view(values.shape[0] * cores, -1),
            per_sample_weights=weights.transpose(1, 2).reshape(tokens * cores, picks),
            mode="sum",
        ).view(tokens, values.shape[1])
    assert blocks is not None
    # [T * C, E, P] @ [T * C, P, Dc]: each block sees the weights of its own picks and zeros elsewhere.
    own = functional.one_hot(blocks, num_blocks).to(weights.dtype)
    by_block = torch.einsum("tpc,tpe->tcep", weights, own).flatten(0, 1)
    slices = functional.embedding(rows, values).view(tokens, picks, cores, -1).transpose(1, 2).flatten(0, 1)
    summed = torch.bmm(by_block, slices).view(tokens, cores, num_blocks, -1)
    return summed.transpose(1, 2).reshape(tokens, num_blocks * values.shape[1])


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
        return (picked * upstream).view(tokens, picks, cores, -1).sum(-1)
    # One product per token, [P, Dv] @ [Dv, C] with zeros outside each core's slice: cheaper than cutting the rows up.
    own = torch.eye(cores, dtype=upstream.dtype, device=upstream.device).view(1, cores, 1, cores)
    return torch.bmm(picked, (upstream.view(tokens, cores, -1, 1) * own).view(tokens, -1, cores))


def _add_value_gradient(value_sum: Tensor, rows: Tensor, upstream: Tensor, weights: Tensor) -> None:
    """Add weights[t, p, c] * upstream[t, p, slice c] to row rows[t, p] of ``value_sum``."""
    tokens, picks = rows.shape
    cores = weights.shape[-1]
    split = upstream.view(tokens, -1, cores, upstream.shape[-1] // cores)
    rows_grad = (weights.unsqueeze(-1) * split).view(tokens * picks, -1)
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


# -- parts of the lookup, without autograd, for tables of which a rank holds some columns ---------------------------


@torch.no_grad()
def pre_scores(rows: Tensor, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """rho before its activation, [T, P] in ``dtype``; with some of the Dp columns, their part of the sum."""
    rho = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    for part in _chunks(rows, pre_values):
        rho[part] = pre_value_scores(rows[part], projected[part], pre_values)
    return rho


@torch.no_grad()
def pre_scores_backward(
    rows: Tensor, rho_grad: Tensor, projected: Tensor, pre_values: Tensor, pre_value_sum: Optional[Tensor]
) -> Tensor:
    """From the gradient of rho [T, P] to that of ``projected`` [T, Dp]; the table's is added to ``pre_value_sum``."""
    projected_grad = torch.empty_like(projected)
    for part in _chunks(rows, pre_values):
        projected_grad[part] = _pre_value_gradients(
            rows[part], rho_grad[part], projected[part], pre_values, pre_value_sum
        )
    return projected_grad


@torch.no_grad()
def weighted_sum_backward(
    rows: Tensor,
    blocks: Optional[Tensor],
    weights: Tensor,
    grad_out: Tensor,
    values: Tensor,
    value_sum: Optional[Tensor],
) -> Tensor:
    """From the gradient of ``weighted_sum``'s result, [T, E, Dv], to that of ``weights`` [T, P, C]; the table's is
    added to ``value_sum``."""
    weight_grad = torch.empty_like(weights)
    for part in _chunks(rows, values):
        upstream = _upstream_of_picks(grad_out[part], blocks[part] if blocks is not None else None, weights.dtype)
        weight_grad[part] = _weight_gradient(rows[part], upstream, values, weights)
        if value_sum is not None:
            _add_value_gradient(value_sum, rows[part], upstream, weights[part])
    return weight_grad
