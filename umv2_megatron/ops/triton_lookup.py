"""The lookup on NVIDIA GPUs: Triton kernels, one pass forward, gradients of the tables straight into ``main_grad``.

Forward is one kernel that reads every picked row of both tables once. Backward reads them once more in one kernel,
values for the gradients of scores and rho and pre-values for that of the projected input, and adds up the gradients of
both tables in another. By default picks are sorted by row first, and one program owns a row: results are repeatable bit
by bit. With ``deterministic=False`` (``atomic_lookup``) the tables' gradients are added by atomic operations and
nothing is sorted; torch.use_deterministic_algorithms, which --deterministic-mode sets, overrides that.

The forward of rows too wide for one program (``triton_launch.WIDEST_ROW``) goes through the parts that sharded tables
use. Unlike ``scatter`` and ``reference``, rho and all sums are kept in float32 (float64 in a
float64 model) with half-precision tables too.

Letters as in ``interface.py``. Nothing waits for the GPU and no shape depends on data: a CUDA graph can hold it.
"""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from umv2_megatron.ops import triton_launch as launches
from umv2_megatron.ops.interface import PickOrder, activate
from umv2_megatron.ops.main_grad import gradient_sum, hand_over
from umv2_megatron.ops.triton_launch import Addition, PickList


def require_device() -> None:
    """Raise ``ImportError`` with the reason where Triton kernels cannot run."""
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        raise ImportError("there is no CUDA device; TRITON_INTERPRET=1 runs the kernels slowly on a CPU")


def lookup(
    rows: Tensor,
    blocks: Optional[Tensor],
    scores: Tensor,
    projected: Optional[Tensor],
    pre_values: Optional[Tensor],
    values: Tensor,
    num_blocks: int,
    activation: str,
    deterministic: bool = True,
    order: Optional[PickOrder] = None,
) -> Tensor:
    """See ``interface.TableLookup``; ``deterministic`` as at the top of this file. ``order``: of these ``rows``; it may
    have been made by ``sort_ahead``."""
    assert num_blocks == 1 or blocks is not None, "several blocks need the block of each pick"
    assert (pre_values is None) == (projected is None), "pre-values and the projected input come together"
    assert activation in ("none", "gelu"), activation
    return _Lookup.apply(rows, blocks, scores, projected, pre_values, values, num_blocks, activation, deterministic,
                         order)  # fmt: skip


def sort_ahead(rows: Tensor, num_rows: int, order: PickOrder) -> None:
    """See ``interface.Backend``."""
    _sorted(PickList.grid(rows, None, 1), num_rows, True, order)


atomic_lookup = functools.partial(lookup, deterministic=False)


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
        deterministic: bool,
        order: Optional[PickOrder],
    ) -> Tensor:
        cores = scores.shape[-1]
        exact = scores.to(launches.exact_dtype(scores, values)).contiguous()
        picks = PickList.grid(rows, blocks, num_blocks)
        rho: Optional[Tensor] = None
        if pre_values is None or projected is None:
            out = launches.row_sums(picks, exact.flatten(0, 1), values)
        elif launches.can_fuse(pre_values.shape[1], cores, values.shape[1] // cores):
            out, rho = launches.fused_forward(picks, exact, projected, pre_values, values, activation == "gelu")
        else:
            rho = pre_scores(rows, projected, pre_values, exact.dtype)
            out = weighted_sum(rows, blocks, exact * activate(rho, activation).unsqueeze(-1), values, num_blocks)
        # The tables are saved as attributes: they are parameters, and their main_grad must be found again.
        ctx.save_for_backward(rows, blocks, scores, projected, rho)
        ctx.pre_values, ctx.values = pre_values, values
        ctx.num_blocks, ctx.activation, ctx.deterministic = num_blocks, activation, deterministic
        ctx.order = order
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        rows, blocks, scores, projected, rho = ctx.saved_tensors
        values, pre_values, activation, needs = ctx.values, ctx.pre_values, ctx.activation, ctx.needs_input_grad
        # The node lives as long as the loss, into the next forward: what was sorted must not.
        order, ctx.order = ctx.order, None
        exact = scores.to(launches.exact_dtype(scores, values)).contiguous()
        picks = PickList.grid(rows, blocks, ctx.num_blocks)
        upstream = grads[0].reshape(-1, values.shape[1]).contiguous()
        cores = scores.shape[-1]
        projected_grad, rho_grad = None, None
        if rho is None:
            weights = exact
            score_grad = launches.row_dots(picks, upstream, values, cores, exact.dtype).view_as(exact)
        else:
            weights, score_grad, rho_grad, projected_grad = launches.score_gradients(
                picks, exact, rho, upstream, values, activation == "gelu", pre_values if needs[3] else None
            )

        value_sum = gradient_sum(values) if needs[5] else None
        pre_value_sum = gradient_sum(pre_values) if pre_values is not None and needs[4] else None
        additions = []
        if value_sum is not None:
            additions.append(Addition(weights.flatten(0, 1), upstream, value_sum, ctx.num_blocks))
        if pre_value_sum is not None and rho_grad is not None:
            additions.append(Addition(rho_grad.view(-1, 1), projected.contiguous(), pre_value_sum))
        if additions:
            launches.add_to_rows(picks, additions, _sorted(picks, values.shape[0], ctx.deterministic, order))
        return (
            None,
            None,
            score_grad.to(scores.dtype) if needs[2] else None,
            projected_grad.to(projected.dtype) if projected_grad is not None else None,
            hand_over(pre_values, pre_value_sum),
            hand_over(values, value_sum),
            None,
            None,
            None,
            None,
        )


def _sorted(
    picks: PickList, num_rows: int, deterministic: bool, order: Optional[PickOrder]
) -> Optional[launches.Segments]:
    """The picks sorted by row, or None for atomic sums."""
    if not (deterministic or torch.are_deterministic_algorithms_enabled()):
        return None
    order = order or PickOrder()
    if order.made is None:
        order.made = launches.sort_picks(picks, num_rows)
    return order.made


# -- parts of the lookup, without autograd, for tables of which a rank holds some columns (as in scatter.py) ----------


@torch.no_grad()
def pre_scores(rows: Tensor, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """rho before its activation, [T, P] in ``dtype``; with some of the Dp columns, their part of the sum."""
    picks = PickList.grid(rows, None, 1)
    exact = launches.exact_dtype(pre_values)
    return launches.row_dots(picks, projected.contiguous(), pre_values, 1, exact).view(rows.shape).to(dtype)


@torch.no_grad()
def pre_scores_backward(
    rows: Tensor,
    rho_grad: Tensor,
    projected: Tensor,
    pre_values: Tensor,
    pre_value_sum: Optional[Tensor],
    order: Optional[PickOrder] = None,
    deterministic: bool = True,
) -> Tensor:
    """From the gradient of rho [T, P] to that of ``projected`` [T, Dp]; the table's is added to ``pre_value_sum``."""
    picks = PickList.grid(rows, None, 1)
    return _pre_scores_backward(picks, rho_grad, projected, pre_values, pre_value_sum, deterministic, order)


@torch.no_grad()
def weighted_sum(rows: Tensor, blocks: Optional[Tensor], weights: Tensor, values: Tensor, num_blocks: int) -> Tensor:
    """The weighted sum of ``interface.TableLookup`` given the final ``weights`` [T, P, C]."""
    exact = weights.to(launches.exact_dtype(weights, values)).flatten(0, 1).contiguous()
    return launches.row_sums(PickList.grid(rows, blocks, num_blocks), exact, values)


@torch.no_grad()
def weighted_sum_backward(
    rows: Tensor,
    blocks: Optional[Tensor],
    weights: Tensor,
    grad_out: Tensor,
    values: Tensor,
    value_sum: Optional[Tensor],
    order: Optional[PickOrder] = None,
    deterministic: bool = True,
) -> Tensor:
    """From the gradient of ``weighted_sum``'s result, [T, E, Dv], to that of ``weights`` [T, P, C]; the table's is
    added to ``value_sum``."""
    picks = PickList.grid(rows, blocks, grad_out.shape[1])
    flat = weights.flatten(0, 1)
    grad = _weighted_sum_backward(picks, flat, grad_out, values, value_sum, deterministic, order)
    return grad.view_as(weights)


# -- what grids and ragged lists have in common -----------------------------------------------------------------------


def _pre_scores_backward(
    picks: PickList,
    rho_grad: Tensor,
    projected: Tensor,
    pre_values: Tensor,
    pre_value_sum: Optional[Tensor],
    deterministic: bool,
    order: Optional[PickOrder],
) -> Tensor:
    weights = rho_grad.to(launches.exact_dtype(rho_grad, pre_values)).reshape(-1, 1).contiguous()
    if pre_value_sum is not None:
        addition = Addition(weights, projected.contiguous(), pre_value_sum)
        launches.add_to_rows(picks, [addition], _sorted(picks, pre_values.shape[0], deterministic, order))
    return launches.row_sums(picks, weights, pre_values).to(projected.dtype)


def _weighted_sum_backward(
    picks: PickList,
    weights: Tensor,
    grad_out: Tensor,
    values: Tensor,
    value_sum: Optional[Tensor],
    deterministic: bool,
    order: Optional[PickOrder],
) -> Tensor:
    exact = weights.to(launches.exact_dtype(weights, values)).contiguous()
    upstream = grad_out.reshape(-1, values.shape[1]).contiguous()
    if value_sum is not None:
        in_order = _sorted(picks, values.shape[0], deterministic, order)
        table = values if in_order is not None else None
        dots = launches.add_to_rows(picks, [Addition(exact, upstream, value_sum, picks.num_blocks, table)], in_order)
        if dots is not None:
            return dots.to(weights.dtype)
    return launches.row_dots(picks, upstream, values, weights.shape[1], exact.dtype).to(weights.dtype)
