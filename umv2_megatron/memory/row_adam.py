"""Adam for value tables with one second moment for each row, instead of one for each element.

For row r of a table with D columns, gradient g, learning rate a, weight decay w, and t steps so far:

    m_rj = beta1 m_rj + (1 - beta1) g_rj                                    exp_avg, as in Adam
    v_r  = beta2 v_r + (1 - beta2) (1/D) sum_j g_rj^2                       exp_avg_sq_row
    p_rj = (1 - a w) p_rj - a m_rj / (1 - beta1^t) / (sqrt(v_r / (1 - beta2^t)) + eps)

All rows take part in every step, as in Adam over the dense table: in a row that nobody picked, g = 0, both moments
decay, and the parameters follow the first moment and the weight decay.

D counts the columns of the whole table. A rank may hold a part of the columns (--memory-parallel-mode dim) and, with
the distributed optimizer, a range of elements that begins and ends inside rows. Then the sums of squares of a row are
added up over the ranks that hold it, so that a layout changes nothing but the rounding; these ranks all keep v_r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor

from umv2_megatron.config.table_shard import rows_of_range
from umv2_megatron.parallel import cpu_platform

ROW_MOMENT = "exp_avg_sq_row"


@dataclass
class TableRange:
    """Consecutive elements of one parameter of a table [rows here, columns here]: from ``start`` on, as many as
    ``held`` has.

    Args:
        held: what the optimizer updates, float32, flat or [rows, columns], contiguous.
        columns: of this rank's part of the table.
        whole_columns: D, of the whole table.
        start: place of the first element in the row-major order of this rank's part.
    """

    held: Tensor
    columns: int
    whole_columns: int
    start: int = 0
    first: int = field(init=False)
    """First row that the range has elements of."""
    rows: int = field(init=False)
    """Rows that it has elements of, whole or in part."""

    def __post_init__(self) -> None:
        first, end = rows_of_range(self.start, self.start + self.held.numel(), self.columns)
        self.first, self.rows = first, end - first

    @property
    def begins_inside(self) -> bool:
        """Whether the first row begins in another rank's range."""
        return self.rows > 0 and self.start % self.columns != 0

    def blocks(self) -> list[tuple[slice, slice, int]]:
        """The range as matrices of whole rows or of one part of a row: (elements, rows, width), at most three."""
        stop = self.start + self.held.numel()
        found: list[tuple[slice, slice, int]] = []
        place = self.start
        while place < stop:
            row, column = divmod(place, self.columns)
            whole = (stop - place) // self.columns if column == 0 else 0
            size = whole * self.columns or min(stop - place, self.columns - column)
            width = self.columns if whole else size
            rows = slice(row - self.first, row - self.first + size // width)
            found.append((slice(place - self.start, place - self.start + size), rows, width))
            place += size
        return found


class RowAdam(torch.optim.Optimizer):
    """The Adam of this module over ranges of value tables.

    Its state has ``exp_avg`` [like the parameter] and ``exp_avg_sq_row`` [rows of the range], both float32; the number
    of steps is ``step`` of each parameter group. The host never waits for the device, and no tensor of a table's size
    is made but with weight decay that is not decoupled.

    Args:
        groups: parameter groups with lr, betas, eps and weight_decay; their tensors are the ranges' ``held``.
        ranges: of every parameter in the groups.
        decoupled: weight decay apart from the gradient (AdamW), or added to it.
        sum_over_columns: adds a vector up over the ranks that hold the other columns of the same ranges, in place; None
            where one rank holds all columns.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        ranges: Sequence[TableRange],
        decoupled: bool,
        sum_over_columns: Optional[Callable[[Tensor], object]] = None,
    ) -> None:
        super().__init__([{"params": []}], {})
        self.param_groups = groups  # not by torch, which refuses mcore's shares: views of float32 parameters
        self.ranges = {part.held: part for part in ranges}
        held = [tensor for group in self.param_groups for tensor in group["params"]]
        assert len(held) == len(ranges) and all(tensor in self.ranges for tensor in held), "each tensor has its range"
        self._decoupled = decoupled
        self._sum_over_columns = sum_over_columns
        self._shared: Optional[tuple[int, Tensor, Tensor, Callable[[Tensor], object]]] = None
        for group in self.param_groups:
            group.setdefault("step", 0)

    def share_rows(
        self, count: int, slots: Sequence[int], places: Sequence[int], sum_over_shares: Callable[[Tensor], object]
    ) -> None:
        """Say which rows lie in the ranges of several of the ranks that divide the optimizer's state: ``count`` in all.

        This rank has those numbered ``slots``, at ``places`` in the rows of all its ranges, one range after the other.
        ``sum_over_shares`` adds a vector up over these ranks, in place.
        """
        slot, place = (torch.tensor(numbers, dtype=torch.long, device=self._device()) for numbers in (slots, places))
        self._shared = (count, slot, place, sum_over_shares) if count else None

    def allocate(self) -> None:
        """Make the state of before the first step, where there is none."""
        for tensor, part in self.ranges.items():
            if not self.state[tensor]:
                self.state[tensor] = {
                    "exp_avg": torch.zeros_like(tensor),
                    ROW_MOMENT: torch.zeros(part.rows, dtype=torch.float32, device=tensor.device),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all tables from their gradients. Collective where rows or columns are shared between ranks."""
        assert closure is None
        self.allocate()
        gradients = {tensor: self._gradient(tensor, group) for group in self.param_groups for tensor in group["params"]}
        means = self._mean_squares(gradients)
        for group in self.param_groups:
            group["step"] += 1
            for tensor in group["params"]:
                self._update(tensor, gradients[tensor], means[tensor], group)

    def _gradient(self, tensor: Tensor, group: dict[str, Any]) -> Tensor:
        assert tensor.grad is not None, "every table has a gradient, zero where nothing was picked"
        decay = group["weight_decay"]
        return tensor.grad if self._decoupled or decay == 0 else tensor.grad.add(tensor, alpha=decay)

    def _mean_squares(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """(1/D) sum_j g_rj^2 of the rows of every range."""
        count = sum(part.rows for part in self.ranges.values())
        sums = torch.empty(count, dtype=torch.float32, device=self._device())
        for place, tensor in zip(self._places(), self.ranges, strict=True):
            gradient = gradients[tensor].view(-1)
            for elements, rows, width in self.ranges[tensor].blocks():
                norms = torch.linalg.vector_norm(gradient[elements].view(-1, width), dim=1)
                sums[place + rows.start : place + rows.stop] = norms.square_()
        if self._shared is not None:
            count, slots, places, sum_over_shares = self._shared
            travelling = sums.new_zeros(count)
            travelling[slots] = sums[places]
            sum_over_shares(travelling)
            sums[places] = travelling[slots]
        if self._sum_over_columns is not None and len(sums):  # the other columns' ranks have the same rows
            self._sum_over_columns(sums)
        return {
            tensor: sums[place : place + part.rows].div_(part.whole_columns)
            for place, (tensor, part) in zip(self._places(), self.ranges.items(), strict=True)
        }

    def _device(self) -> torch.device:
        """Where the tables are; a rank without any exchanges nothing but zeros."""
        return next(iter(self.ranges)).device if self.ranges else cpu_platform.device()

    def _places(self) -> list[int]:
        """Where the rows of each range begin in those of all."""
        counts = [part.rows for part in self.ranges.values()]
        return [sum(counts[:index]) for index in range(len(counts))]

    def _update(self, tensor: Tensor, gradient: Tensor, means: Tensor, group: dict[str, Any]) -> None:
        denominator = self.row_denominator(tensor, means, group)
        flat, average, gradient = tensor.view(-1), self.state[tensor]["exp_avg"].view(-1), gradient.view(-1)
        for elements, rows, width in self.ranges[tensor].blocks():
            weights, averages, gradients = (each[elements].view(-1, width) for each in (flat, average, gradient))
            update_rows(weights, averages, gradients, denominator[rows], group, decay=self._decoupled)

    def row_denominator(self, tensor: Tensor, means: Tensor, group: dict[str, Any]) -> Tensor:
        """sqrt(v-hat) + eps of the rows of the range of ``tensor``, after v took in ``means`` of this step."""
        _, beta2 = group["betas"]
        row_moment = self.state[tensor][ROW_MOMENT].lerp_(means, 1 - beta2)
        return row_moment.sqrt().div_(math.sqrt(1 - beta2 ** group["step"])).add_(group["eps"])


def update_rows(
    weights: Tensor, average: Tensor, gradient: Tensor, denominator: Tensor, group: dict[str, Any], *, decay: bool
) -> None:
    """m and p of some rows, in place, as at the top of this file.

    Args:
        weights, average, gradient: p, m and g, [rows, columns].
        denominator: of each row.
        group: lr, betas, weight_decay, and step with this one counted.
        decay: whether the weights shrink here (AdamW).
    """
    (beta1, _), rate = group["betas"], group["lr"]
    if decay and group["weight_decay"] != 0:
        weights.mul_(1 - rate * group["weight_decay"])
    average.lerp_(gradient, 1 - beta1)
    weights.addcdiv_(average, denominator[:, None], value=-rate / (1 - beta1 ** group["step"]))
