"""An optimizer for some rows of value tables, which leaves every other row bit for bit as it is.

mcore's optimizer around it holds whole tables, or ranges of their elements, and deals out their gradients. From each
range the elements of selected rows are gathered into a compact tensor; an Adam whose state is of that size updates it,
and the result is put back. So neither moments nor weight decay touch other rows, whatever their gradients, and other
rows have no state.

    held     [range of a table's part]     what mcore has: float32 weights, gradients
    compact  [elements of selected rows]   the same elements as a range of the table of selected rows alone

The compact tensors of all ranks together are a table [S, D] of the S selected rows, in their order; a compact tensor is
a contiguous range of this rank's part of it, which begins and ends inside rows where the held one does. So whatever is
made for ranges of tables (``RowAdam``, the pieces of a checkpoint) is made for these.

Gradients of other rows are set to zero before the norm of all gradients is taken: clipping sees what is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from umv2_megatron.memory.row_adam import TableRange


@dataclass(frozen=True)
class SelectedPart:
    """The selected rows of one rank's part of a table.

    rows: their numbers in the part, ascending, int64 on the CPU; before: selected rows of the parts before it; total:
    S, those of the whole table.
    """

    rows: Tensor
    before: int
    total: int


@dataclass
class SelectedRange:
    """The elements of selected rows in a range of a table.

    Args:
        whole: the range.
        part: of the table's part that the range is of.
    """

    whole: TableRange
    part: SelectedPart
    compact: Tensor = field(init=False)
    """[elements] float32."""
    range: TableRange = field(init=False)
    """Of ``compact``, in the table of selected rows."""
    _blocks: list[tuple[slice, int, Tensor, slice]] = field(init=False)
    """Of the held tensor: elements, width, rows to take of them; and the compact elements that these are."""

    def __post_init__(self) -> None:
        whole, rows = self.whole, self.part.rows
        device = whole.held.device
        self._blocks = []
        done = 0
        for elements, numbers, width in whole.blocks():
            low, high = (int(torch.searchsorted(rows, whole.first + each)) for each in (numbers.start, numbers.stop))
            taken = rows[low:high] - (whole.first + numbers.start)
            if len(taken):
                self._blocks.append((elements, width, taken.to(device), slice(done, done + len(taken) * width)))
                done += len(taken) * width
        self.compact = torch.zeros(done, dtype=torch.float32, device=device)
        earlier = int(torch.searchsorted(rows, whole.first))
        first_selected = earlier < len(rows) and int(rows[earlier]) == whole.first
        start = earlier * whole.columns + (whole.start % whole.columns if first_selected else 0)
        self.range = TableRange(self.compact, whole.columns, whole.whole_columns, start)

    def gather(self, source: Tensor, target: Tensor) -> None:
        """Elements of ``source``, like ``held``, into ``target``, like ``compact``."""
        flat = source.view(-1)
        for elements, width, rows, place in self._blocks:
            torch.index_select(flat[elements].view(-1, width), 0, rows, out=target[place].view(-1, width))

    def scatter(self, source: Tensor, target: Tensor) -> None:
        """The other way round; other elements of ``target`` stay."""
        flat = target.view(-1)
        for elements, width, rows, place in self._blocks:
            flat[elements].view(-1, width).index_copy_(0, rows, source[place].view(-1, width))


class CompactAdam(torch.optim.Optimizer):
    """Adam (or AdamW, if ``decoupled``) by torch's fused kernel; the number of steps is ``step`` of each group."""

    def __init__(self, groups: list[dict[str, Any]], decoupled: bool) -> None:
        super().__init__([{"params": []}], {})
        self.param_groups = groups
        self._decoupled = decoupled
        for group in self.param_groups:
            group.setdefault("step", 0)

    def allocate(self) -> None:
        """Make the state of before the first step, where there is none."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if not self.state[tensor]:
                    self.state[tensor] = {name: torch.zeros_like(tensor) for name in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all tensors from their gradients."""
        assert closure is None
        self.allocate()
        for group in self.param_groups:
            group["step"] += 1
            held = [each for each in group["params"] if each.numel()]
            if not held:
                continue
            beta1, beta2 = group["betas"]
            steps = [torch.full((), float(group["step"] - 1), device=each.device) for each in held]
            moments = ([self.state[each][name] for each in held] for name in ("exp_avg", "exp_avg_sq"))
            adam(
                held, [each.grad for each in held], *moments, [], steps,  # type: ignore[misc]
                fused=True, decoupled_weight_decay=self._decoupled, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip


class SelectedRowsAdam(torch.optim.Optimizer):
    """What mcore's optimizer of the tables steps: ``inner``, over the compact tensors of ``ranges``.

    Its ``param_groups`` are mcore's, with the held tensors; the state is that of ``inner``.

    Args:
        groups: parameter groups with the held tensors; ``step`` is added.
        ranges: of every held tensor.
        inner: a ``CompactAdam`` or ``RowAdam`` over groups like these, with the compact tensors.
    """

    def __init__(self, groups: list[dict[str, Any]], ranges: Sequence[SelectedRange], inner: Any) -> None:
        super().__init__([{"params": []}], {})
        self.param_groups = groups  # not by torch, which refuses mcore's shares: views of float32 parameters
        self.ranges = {each.whole.held: each for each in ranges}
        self.inner = inner
        self.state = inner.state
        for group in self.param_groups:
            group["step"] = 0

    def allocate(self) -> None:
        """Make the state of before the first step, where there is none."""
        self.inner.allocate()

    @property
    def compact(self) -> list[Tensor]:
        """What is held beside the state: the compact tensors."""
        return [each.compact for each in self.ranges.values()]

    @torch.no_grad()
    def leave_gradients_of_selected(self) -> None:
        """Gradients of all other rows become zero."""
        for held, part in self.ranges.items():
            gradient = self._gather_gradient(held, part)
            held.grad.zero_()  # type: ignore[union-attr]
            part.scatter(gradient, held.grad)  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the selected rows from the gradients of the held tensors."""
        assert closure is None
        for held, part in self.ranges.items():
            part.gather(held, part.compact)
            self._gather_gradient(held, part)
        for outer, group in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update((key, value) for key, value in outer.items() if key != "params")
        self.inner.step()
        for outer, group in zip(self.param_groups, self.inner.param_groups, strict=True):
            outer["step"] = group["step"]
        for held, part in self.ranges.items():
            part.scatter(part.compact, held)

    @staticmethod
    def _gather_gradient(held: Tensor, part: SelectedRange) -> Tensor:
        assert held.grad is not None, "every table has a gradient, zero where nothing was picked"
        if part.compact.grad is None:
            part.compact.grad = torch.zeros_like(part.compact)
        part.gather(held.grad, part.compact.grad)
        return part.compact.grad
