"""Adam of value tables with its state in host memory (--memory-value-optimizer-offload).

Moments and, in 16-bit runs, float32 main weights are ordinary host memory; the host computes the update with torch's
fused CPU kernel. Gradients come down and new weights go up in pieces (``parallel/host_copies.py``), so a step needs no
device memory. In float32 runs the weights themselves are the main weights and stay on the device: pieces of them come
down with the gradients.

Pieces begin at multiples of 64 elements, so a vectorized kernel computes every element as it would in one call over
the whole table: on a CPU the results are those of the same Adam without this module, bit by bit.

mcore keeps its gradients in ``.grad`` of what the optimizer updates, on the device. Where the main weights are on the
host, ``placeholder`` makes a tensor for that: it has the main weights' shape and the memory of one element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from torch.optim.adam import adam

from umv2_megatron.memory.row_adam import ROW_MOMENT, RowAdam, TableRange, update_rows
from umv2_megatron.parallel.host_copies import HostPipeline, Piece, copies_for

PIECE = 2**22
"""Elements of a piece: 16 MiB of float32 gradients. Copies this long reach a bus's bandwidth."""
_LANES = 64


@dataclass(frozen=True)
class HostTable:
    """What is updated of a table: ``held`` is the tensor in the parameter groups, whose ``grad`` mcore sets;
    ``weights``, flat and on the device, are the model's, in the run's dtype; ``main``, flat and on the host, the
    float32 main weights, None where ``weights`` are float32."""

    held: Tensor
    weights: Tensor
    main: Optional[Tensor]


def placeholder(main: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device`` like ``main``, attributes included, that can have a gradient but holds no numbers."""
    made = torch.zeros(1, dtype=main.dtype, device=device).expand(main.shape)
    vars(made).update(vars(main))
    return made


def main_weights(optimizer: torch.optim.Optimizer, held: Tensor) -> Tensor:
    """The float32 main weights behind ``held`` of one of the optimizer's parameter groups."""
    main = optimizer.tables[held].main if isinstance(optimizer, _InPieces) else None
    return held if main is None else main.view(held.shape)


class _InPieces(torch.optim.Optimizer):
    """A step that goes through the pieces of all tables; ``_begin`` makes them."""

    tables: dict[Tensor, HostTable]
    _started = False

    def _place(self, tables: Sequence[HostTable], piece: int) -> None:
        self.tables = {table.held: table for table in tables}
        self._piece = piece
        device = tables[0].weights.device if tables else torch.device("cpu")
        self._pipeline = HostPipeline(copies_for(device))

    def _begin(self) -> Iterator[Piece]:
        raise NotImplementedError

    @torch.no_grad()
    def start(self) -> None:
        """Let the first gradients come down; they must be final. ``step`` goes on from here, and must follow."""
        self._pipeline.start(self._begin())
        self._started = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all tables from their gradients."""
        assert closure is None
        if not self._started:
            self.start()
        self._started = False
        for group in self.param_groups:
            group["step"] += 1
        self._pipeline.finish()


class HostAdam(_InPieces):
    """Adam (or AdamW, if ``decoupled``) with a second moment for each element.

    Its state has ``exp_avg`` and ``exp_avg_sq``, float32, on the host; the number of steps is ``step`` of each group.

    Args:
        groups: parameter groups with lr, betas, eps and weight_decay; their tensors are the tables' ``held``.
        tables: of every tensor in the groups.
        piece: elements that travel at once, a multiple of 64.
    """

    def __init__(
        self, groups: list[dict[str, Any]], tables: Sequence[HostTable], decoupled: bool, piece: int = PIECE
    ) -> None:
        super().__init__([{"params": []}], {})
        self.param_groups = groups  # not by torch, which refuses mcore's shares: views of float32 parameters
        self._decoupled = decoupled
        self._place(tables, piece)
        for group in self.param_groups:
            group.setdefault("step", 0)

    def allocate(self) -> None:
        """Make the state of before the first step, where there is none."""
        for held in self.tables:
            if not self.state[held]:
                self.state[held] = {
                    name: torch.zeros(held.shape, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")
                }

    def _begin(self) -> Iterator[Piece]:
        self.allocate()
        return self._pieces()

    def _pieces(self) -> Iterator[Piece]:
        for group in self.param_groups:
            for held in group["params"]:
                table, state = self.tables[held], self.state[held]
                gradient = _gradient(held)
                for start in range(0, gradient.numel(), self._piece):
                    part = slice(start, start + self._piece)
                    moments = [state[name].view(-1)[part] for name in ("exp_avg", "exp_avg_sq")]
                    yield _piece(table, part, gradient, self._update(group, moments))

    def _update(self, group: dict[str, Any], moments: list[Tensor]) -> Callable[[Tensor, Tensor], None]:
        def update(weights: Tensor, gradient: Tensor) -> None:
            beta1, beta2 = group["betas"]
            adam(
                [weights], [gradient], *([each] for each in moments), [], [torch.tensor(float(group["step"] - 1))],
                fused=True, decoupled_weight_decay=self._decoupled, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip

        return update


class HostRowAdam(_InPieces, RowAdam):
    """``RowAdam`` whose first moments and main weights are on the host; so are the second moments, one for each row.

    The mean squares of the rows are computed on the device, where the gradients are.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        ranges: Sequence[TableRange],
        tables: Sequence[HostTable],
        sum_over_columns: Optional[Callable[[Tensor], object]] = None,
        piece: int = PIECE,
    ) -> None:
        RowAdam.__init__(self, groups, ranges, True, sum_over_columns)
        self._place(tables, piece)

    def allocate(self) -> None:
        """Make the state of before the first step, where there is none."""
        for held, part in self.ranges.items():
            if not self.state[held]:
                self.state[held] = {
                    "exp_avg": torch.zeros(held.shape, dtype=torch.float32),
                    ROW_MOMENT: torch.zeros(part.rows, dtype=torch.float32),
                }

    def _begin(self) -> Iterator[Piece]:
        self.allocate()
        return self._pieces(self._mean_squares({held: _gradient(held) for held in self.ranges}))

    def _pieces(self, means: dict[Tensor, Tensor]) -> Iterator[Piece]:
        for group in self.param_groups:
            for held in group["params"]:
                average, gradient = self.state[held]["exp_avg"].view(-1), _gradient(held)
                denominator = _Denominator(self, held, means[held], group)
                for elements, rows, width in self.ranges[held].blocks():
                    at_once = max(1, self._piece // (_LANES * width)) * _LANES
                    for first in range(rows.start, rows.stop, at_once):
                        end = min(first + at_once, rows.stop)
                        offset = elements.start + (first - rows.start) * width
                        part = slice(offset, offset + (end - first) * width)
                        update = self._rows(group, average[part], denominator, slice(first, end), width)
                        yield _piece(self.tables[held], part, gradient, update)

    def _rows(
        self, group: dict[str, Any], average: Tensor, denominator: _Denominator, rows: slice, width: int
    ) -> Callable[[Tensor, Tensor], None]:
        def update(weights: Tensor, gradient: Tensor) -> None:
            matrices = weights.view(-1, width), average.view(-1, width), gradient.view(-1, width)
            update_rows(*matrices, denominator.of(rows), group, decay=True)

        return update


class _Denominator:
    """What the rows of a table divide their first moments by; the second moments move on when it is first asked."""

    def __init__(self, optimizer: HostRowAdam, held: Tensor, means: Tensor, group: dict[str, Any]) -> None:
        self._asked: Optional[Tensor] = None
        self._compute = lambda: optimizer.row_denominator(held, means.cpu(), group)

    def of(self, rows: slice) -> Tensor:
        if self._asked is None:
            self._asked = self._compute()
        return self._asked[rows]


def _gradient(held: Tensor) -> Tensor:
    assert held.grad is not None, "every table has a gradient, zero where nothing was picked"
    return held.grad.view(-1)


def _piece(table: HostTable, part: slice, gradient: Tensor, update: Callable[[Tensor, Tensor], None]) -> Piece:
    """``update(weights, gradient)`` on the host for the elements ``part`` of a table."""
    main = table.main

    def in_place(sources: Sequence[Tensor], weights: Tensor) -> None:
        update(weights, sources[0])

    def by_main(sources: Sequence[Tensor], weights: Tensor) -> None:
        assert main is not None
        update(main[part], sources[0])
        weights.copy_(main[part])

    return Piece((gradient[part],), table.weights[part], in_place if main is None else by_main, changes=main is None)
