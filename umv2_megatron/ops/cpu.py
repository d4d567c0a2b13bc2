"""The lookup of choice on CPUs: compiled loops over the picks that touch only picked rows (``cpu_kernels.cpp``).

Scores, weights and sums are float32 for float32 and bfloat16 tables, float64 for float64 tables. Gradients of tables
are added to main_grad as float32. Results are repeatable bit by bit, for any number of threads; the number is torch's
(``torch.set_num_threads``, OMP_NUM_THREADS). Combinations of dtypes that the kernels lack (``supports``) take the
functions of ``scatter.py``.

Here: picks on a [T, P] grid. ``cpu_ragged.py``: picks in a list. Both call ``Picks.run`` with a flat list.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, Optional, TypeVar, cast

import torch
from torch import Tensor

from umv2_megatron.ops import cpu_build, scatter
from umv2_megatron.ops.interface import PickOrder

Part = TypeVar("Part", bound=Callable[..., Tensor])
"""A function of ``interface.GridParts`` or ``interface.RaggedParts``."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_SUM_DTYPES = {
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
}


class _Call(ctypes.Structure):
    """As in cpu_kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "blocks", "tokens")),
        *(
            (name, ctypes.c_int64)
            for name in ("picks", "per_token", "num_rows", "num_blocks", "width", "pre_width", "cores", "threads")
        ),
        *((name, ctypes.c_int64) for name in ("table_dtype", "sum_dtype")),
    ]


def supports(table: Tensor, gradient: Optional[Tensor] = None) -> bool:
    """Whether there are kernels for the dtypes of a table and of its gradient."""
    return table.dtype in _DTYPES and (gradient is None or gradient.dtype in _SUM_DTYPES[table.dtype])


def or_plain(plain: ModuleType, table: str, gradient: Optional[str] = None) -> Callable[[Part], Part]:
    """Makes a function of kernels one for every dtype: it calls that of ``plain``, of the same name, for those that
    the kernels lack. ``table`` and ``gradient`` name the arguments that decide. Arguments are positional."""

    def decorate(compiled: Part) -> Part:
        instead, names = getattr(plain, compiled.__name__), list(inspect.signature(compiled).parameters)
        table_at, gradient_at = names.index(table), names.index(gradient) if gradient else None

        @functools.wraps(compiled)
        def part(*arguments: Any) -> Tensor:
            found = None if gradient_at is None else arguments[gradient_at]
            return (compiled if supports(arguments[table_at], found) else instead)(*arguments)

        return cast(Part, part)

    return decorate


class Picks:
    """n picks, flat; ``tokens`` [n] is None where every token has ``per_token`` picks."""

    def __init__(self, rows: Tensor, blocks: Optional[Tensor], tokens: Optional[Tensor], per_token: int = 1) -> None:
        self.rows, self.per_token = rows.contiguous(), per_token
        self.blocks = blocks.contiguous() if blocks is not None else None
        self.tokens = tokens.contiguous() if tokens is not None else None

    def run(
        self,
        function: str,
        table: Tensor,
        num_blocks: int,
        cores: int,
        *arguments: Optional[Tensor],
        sum_dtype: Optional[torch.dtype] = None,
        pre_width: int = 0,
    ) -> None:
        """Call the kernel ``function`` with the data of ``arguments``. Raises ``IndexError`` for rows out of range."""
        for tensor in (self.rows, self.blocks, self.tokens, *arguments):
            assert tensor is None or (tensor.is_contiguous() and tensor.is_cpu), (function, tensor.shape)
        for index in (self.rows, self.blocks, self.tokens):
            assert index is None or (index.dtype == torch.int64 and index.numel() == self.rows.numel())
        call = _Call(
            _pointer(self.rows),
            _pointer(self.blocks),
            _pointer(self.tokens),
            self.rows.numel(),
            self.per_token,
            table.shape[0],
            num_blocks,
            table.shape[1],
            pre_width,
            cores,
            torch.get_num_threads(),
            _DTYPES[table.dtype],
            _DTYPES[sum_dtype] if sum_dtype is not None else 0,
        )
        pointers = [ctypes.c_void_p(_pointer(argument)) for argument in arguments]
        if getattr(cpu_build.library(), function)(ctypes.byref(call), *pointers):
            raise IndexError(f"a row is not in 0..{table.shape[0] - 1}, or a block not in 0..{num_blocks - 1}")


def _pointer(tensor: Optional[Tensor]) -> Optional[int]:
    return tensor.data_ptr() if tensor is not None else None


def _wide(table: Tensor) -> torch.dtype:
    """What scores, weights and sums of ``table`` are computed in."""
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).contiguous()


def _sums(picks: Picks, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Room for a sum of every token; zeros where there are tokens without picks, to which kernels write nothing."""
    written = picks.tokens is None and picks.rows.numel() > 0
    return (torch.empty if written else torch.zeros)(tokens, width, dtype=dtype)


# -- flat picks -----------------------------------------------------------------------------------------------------


def flat_pre_scores(picks: Picks, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """rho before its activation, in the shape of ``picks.rows`` and in ``dtype``."""
    rho = torch.empty(picks.rows.shape, dtype=_wide(pre_values))
    inputs = _as(projected, pre_values.dtype)
    picks.run("umv2_pre_scores", pre_values, 1, 1, inputs, pre_values, rho)
    return rho.to(dtype)


def flat_weighted_sum(picks: Picks, tokens: int, weights: Tensor, values: Tensor, num_blocks: int) -> Tensor:
    """[T, E * Dv] for T = ``tokens``."""
    out = _sums(picks, tokens, num_blocks * values.shape[1], values.dtype)
    weights = _as(weights, _wide(values))
    picks.run("umv2_weighted_sum", values, num_blocks, weights.shape[-1], weights, values, out)
    return out


def flat_weighted_sum_backward(
    picks: Picks, weights: Tensor, grad_out: Tensor, values: Tensor, value_sum: Optional[Tensor]
) -> Tensor:
    """The gradient of ``weights``, in its shape and dtype."""
    wide = _as(weights, _wide(values))
    weight_grad = torch.empty_like(wide)
    upstream = _as(grad_out, values.dtype)
    picks.run(
        "umv2_weighted_sum_backward", values, grad_out.shape[1], weights.shape[-1],
        wide, upstream, values, weight_grad, value_sum,
        sum_dtype=value_sum.dtype if value_sum is not None else None,
    )  # fmt: skip
    return weight_grad.to(weights.dtype)


def flat_pre_scores_backward(
    picks: Picks, rho_grad: Tensor, projected: Tensor, pre_values: Tensor, pre_value_sum: Optional[Tensor]
) -> Tensor:
    """The gradient of ``projected``."""
    inputs = _as(projected, pre_values.dtype)
    projected_grad = _sums(picks, inputs.shape[0], inputs.shape[1], inputs.dtype)
    picks.run(
        "umv2_pre_scores_backward", pre_values, 1, 1,
        _as(rho_grad, _wide(pre_values)), inputs, pre_values, projected_grad, pre_value_sum,
        sum_dtype=pre_value_sum.dtype if pre_value_sum is not None else None,
    )  # fmt: skip
    return projected_grad.to(projected.dtype)


# -- picks on a grid: ``interface.GridParts`` -----------------------------------------------------------------------


def _grid(rows: Tensor, blocks: Optional[Tensor] = None) -> Picks:
    return Picks(rows, blocks, None, rows.shape[1])


@or_plain(scatter, "pre_values")
def pre_scores(rows: Tensor, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``interface.GridParts``."""
    return flat_pre_scores(_grid(rows), projected, pre_values, dtype)


@or_plain(scatter, "values")
def weighted_sum(rows: Tensor, blocks: Optional[Tensor], weights: Tensor, values: Tensor, num_blocks: int) -> Tensor:
    """See ``interface.GridParts``."""
    picks = _grid(rows, blocks if num_blocks > 1 else None)
    return flat_weighted_sum(picks, rows.shape[0], weights, values, num_blocks)


def one_pass(
    rows: Tensor,
    blocks: Optional[Tensor],
    scores: Tensor,
    projected: Tensor,
    pre_values: Tensor,
    values: Tensor,
    num_blocks: int,
    activation: str,
) -> Optional[tuple[Tensor, Tensor]]:
    """Output and rho of ``whole_table.lookup``, with every pick's rows of both tables read together; the same bits as
    ``pre_scores`` and ``weighted_sum``. None where there is no kernel for it."""
    if activation != "none" or not supports(values):
        return None
    if pre_values.dtype != values.dtype or scores.dtype != _wide(values):
        return None
    assert pre_values.shape[0] == values.shape[0], (pre_values.shape, values.shape)
    picks = _grid(rows, blocks if num_blocks > 1 else None)
    out = _sums(picks, rows.shape[0], num_blocks * values.shape[1], values.dtype)
    rho = torch.empty(rows.shape, dtype=scores.dtype)
    picks.run(
        "umv2_one_pass", values, num_blocks, scores.shape[-1],
        _as(scores, scores.dtype), _as(projected, values.dtype), pre_values, values, rho, out,
        pre_width=pre_values.shape[1],
    )  # fmt: skip
    return out, rho


def one_pass_backward(
    rows: Tensor,
    blocks: Optional[Tensor],
    scores: Tensor,
    rho: Tensor,
    projected: Tensor,
    pre_values: Tensor,
    grad_out: Tensor,
    values: Tensor,
    value_sum: Optional[Tensor],
    pre_value_sum: Optional[Tensor],
) -> Optional[tuple[Tensor, Tensor]]:
    """The gradients of scores and projected input after ``one_pass``; those of the tables are added to the two sums.
    What ``weighted_sum_backward`` and ``pre_scores_backward`` give, but for the last bits; None without a kernel."""
    sums = [each.dtype for each in (value_sum, pre_value_sum) if each is not None]
    if len(set(sums)) > 1 or not supports(values, value_sum) or not supports(pre_values, pre_value_sum):
        return None
    num_blocks = grad_out.shape[1]
    picks = _grid(rows, blocks if num_blocks > 1 else None)
    scores, inputs = _as(scores, scores.dtype), _as(projected, values.dtype)
    score_grad, rho_grad = torch.empty_like(scores), torch.empty_like(rho)
    projected_grad = _sums(picks, inputs.shape[0], inputs.shape[1], inputs.dtype)
    picks.run(
        "umv2_one_pass_backward", values, num_blocks, scores.shape[-1],
        scores, rho, inputs, pre_values, _as(grad_out, values.dtype), values,
        score_grad, rho_grad, projected_grad, value_sum, pre_value_sum,
        sum_dtype=sums[0] if sums else None, pre_width=pre_values.shape[1],
    )  # fmt: skip
    return score_grad, projected_grad.to(projected.dtype)


@or_plain(scatter, "values", "value_sum")
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
    picks = _grid(rows, blocks if grad_out.shape[1] > 1 else None)
    return flat_weighted_sum_backward(picks, weights, grad_out, values, value_sum)


@or_plain(scatter, "pre_values", "pre_value_sum")
def pre_scores_backward(
    rows: Tensor, rho_grad: Tensor, projected: Tensor, pre_values: Tensor, pre_value_sum: Optional[Tensor],
    order: Optional[PickOrder] = None,
) -> Tensor:  # fmt: skip
    """See ``interface.GridParts``."""
    return flat_pre_scores_backward(_grid(rows), rho_grad, projected, pre_values, pre_value_sum)
