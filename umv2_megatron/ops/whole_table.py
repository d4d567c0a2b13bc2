"""The lookup in a whole table, made of a backend's parts: autograd once, for every backend that brings parts.

Why not autograd: a table has hundreds of megabytes, a micro-batch touches a small part of it, and the page faults of a
fresh dense gradient cost several times the arithmetic. So the backward adds each picked row's gradient where mcore
keeps gradients: ``main_grad``, a view of the DDP buffer. ``main_grad.py`` says how mcore learns of it.

Kept for the backward: rows, blocks, scores, the projected input and rho, of which rho [T, P] is new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from umv2_megatron.ops.interface import GridParts, activate, activation_backward
from umv2_megatron.ops.main_grad import gradient_sum, hand_over


class OnePass(NamedTuple):
    """Forward and backward with the rows of both tables read together, for backends that can."""

    forward: Callable[..., Optional[tuple[Tensor, Tensor]]]
    """Takes the arguments of ``lookup`` from ``rows`` on; returns output and rho [T, P], or None where it cannot."""
    backward: Callable[..., Optional[tuple[Tensor, Tensor]]]
    """After ``forward``. Takes rows, blocks, scores, rho, projected input, pre-values, gradient of the output
    [T, E, Dv], values, and what the gradients of values and pre-values are added to, or None; returns the gradients of
    scores and projected input, or None, with nothing added, where it cannot."""


def lookup(
    parts: GridParts,
    rows: Tensor,
    blocks: Optional[Tensor],
    scores: Tensor,
    projected: Optional[Tensor],
    pre_values: Optional[Tensor],
    values: Tensor,
    num_blocks: int,
    activation: str,
    *,
    one_pass: Optional[OnePass] = None,
) -> Tensor:
    """See ``interface.TableLookup``; ``parts`` does the work, ``one_pass`` instead where it can."""
    assert num_blocks == 1 or blocks is not None, "several blocks need the block of each pick"
    assert (pre_values is None) == (projected is None), "pre-values and the projected input come together"
    return _Lookup.apply(rows, blocks, scores, projected, pre_values, values, num_blocks, activation, parts, one_pass)


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
        parts: GridParts,
        one_pass: Optional[OnePass],
    ) -> Tensor:
        rho: Optional[Tensor] = None
        done = None
        weights = scores
        if pre_values is not None and projected is not None:
            if one_pass is not None:
                done = one_pass.forward(rows, blocks, scores, projected, pre_values, values, num_blocks, activation)
            if done is None:
                rho = parts.pre_scores(rows, projected, pre_values, scores.dtype)
                weights = scores * activate(rho, activation).unsqueeze(-1)
        if done is not None:
            out, rho = done
        else:
            out = parts.weighted_sum(rows, blocks, weights, values, num_blocks)
        # The tables are saved as attributes: they are parameters, and their main_grad must be found again.
        ctx.save_for_backward(rows, blocks, scores, projected, rho)
        ctx.pre_values, ctx.values = pre_values, values
        ctx.num_blocks, ctx.activation, ctx.parts = num_blocks, activation, parts
        ctx.one_pass = one_pass if done is not None else None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        rows, blocks, scores, projected, rho = ctx.saved_tensors
        values, pre_values = ctx.values, ctx.pre_values
        needs = ctx.needs_input_grad
        value_sum = gradient_sum(values) if needs[5] else None
        pre_value_sum = gradient_sum(pre_values) if needs[4] else None
        grad_out = grads[0].reshape(rows.shape[0], ctx.num_blocks, values.shape[1])
        done: Optional[tuple[Tensor, Optional[Tensor]]] = None
        if ctx.one_pass is not None:
            done = ctx.one_pass.backward(
                rows, blocks, scores, rho, projected, pre_values, grad_out, values, value_sum, pre_value_sum
            )
        if done is None:
            done = _backward_by_parts(ctx, rows, blocks, scores, projected, rho, grad_out, value_sum, pre_value_sum)
        score_grad, projected_grad = done
        return (
            None,
            None,
            score_grad if needs[2] else None,
            projected_grad if needs[3] else None,
            hand_over(pre_values, pre_value_sum),
            hand_over(values, value_sum),
            None,
            None,
            None,
            None,
        )


def _backward_by_parts(
    ctx: Any,
    rows: Tensor,
    blocks: Optional[Tensor],
    scores: Tensor,
    projected: Optional[Tensor],
    rho: Optional[Tensor],
    grad_out: Tensor,
    value_sum: Optional[Tensor],
    pre_value_sum: Optional[Tensor],
) -> tuple[Tensor, Optional[Tensor]]:
    """The gradients of scores and projected input; those of the tables are added to the two sums."""
    parts = ctx.parts
    active = activate(rho, ctx.activation).unsqueeze(-1) if rho is not None else None
    weights = scores * active if active is not None else scores
    weight_grad = parts.weighted_sum_backward(rows, blocks, weights, grad_out, ctx.values, value_sum)
    if rho is None or active is None:
        return weight_grad, None
    rho_grad = activation_backward((weight_grad * scores).sum(-1), rho, ctx.activation)
    return weight_grad * active, parts.pre_scores_backward(rows, rho_grad, projected, ctx.pre_values, pre_value_sum)
