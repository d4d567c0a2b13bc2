"""The optimizer of selected rows against torch's AdamW and RowAdam over a table of these rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from umv2_megatron.memory.row_adam import RowAdam, TableRange
from umv2_megatron.memory.selected_rows import CompactAdam, SelectedPart, SelectedRange, SelectedRowsAdam

ROWS, WIDTH = 9, 5
SELECTED = torch.tensor([0, 2, 3, 8])
SETTINGS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.3}


def made(held: torch.Tensor, start: int, by_row: bool) -> SelectedRowsAdam:
    """Of the elements ``held`` from ``start`` on, of a table whose part has all rows."""
    part = SelectedRange(TableRange(held, WIDTH, WIDTH, start), SelectedPart(SELECTED, 0, len(SELECTED)))
    inner_group = [{**SETTINGS, "params": [part.compact]}]
    inner: Any = RowAdam(inner_group, [part.range], True) if by_row else CompactAdam(inner_group, True)
    return SelectedRowsAdam([{**SETTINGS, "params": [held]}], [part], inner)


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("by_row", [False, True])
def test_selected_rows_learn_as_a_table_of_their_own(by_row: bool) -> None:
    table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))
    before, alone = table.clone(), table[SELECTED].clone().requires_grad_()
    optimizer = made(table, 0, by_row)
    reference: Any = (
        RowAdam([{**SETTINGS, "params": [alone]}], [TableRange(alone, WIDTH, WIDTH)], True)
        if by_row
        else torch.optim.AdamW([alone], **SETTINGS)
    )
    for step, gradient in enumerate(gradients()):
        table.grad, alone.grad = gradient.clone(), gradient[SELECTED] * (0.5 if step == 1 else 1)
        optimizer.leave_gradients_of_selected()
        if step == 1:
            table.grad.mul_(0.5)  # clipped
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.05 / (step + 1)
        optimizer.step()
        with torch.no_grad():
            reference.step()
    others = [row for row in range(ROWS) if row not in SELECTED]
    assert torch.equal(table[others], before[others])
    torch.testing.assert_close(table[SELECTED], alone.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(table[SELECTED], before[SELECTED]) and optimizer.param_groups[0]["step"] == 4


def test_gradients_of_other_rows_are_no_part_of_the_norm() -> None:
    table = torch.zeros(ROWS, WIDTH)
    optimizer = made(table, 0, False)
    table.grad = torch.full((ROWS, WIDTH), float("nan"))
    table.grad[SELECTED] = 2.0
    optimizer.leave_gradients_of_selected()
    assert float(table.grad.norm()) == pytest.approx(2.0 * (len(SELECTED) * WIDTH) ** 0.5)


@pytest.mark.parametrize("cut", range(0, ROWS * WIDTH + 1))
def test_two_ranges_of_a_table_hold_what_one_does(cut: int) -> None:
    whole = torch.arange(ROWS * WIDTH, dtype=torch.float32)
    pieces = [(whole[:cut], 0), (whole[cut:], cut)]
    found, reached = [], 0
    for held, start in pieces:
        part = SelectedRange(TableRange(held, WIDTH, WIDTH, start), SelectedPart(SELECTED, 0, len(SELECTED)))
        part.gather(held, part.compact)
        if part.compact.numel():
            assert part.range.start == reached
        reached += part.compact.numel()
        found.append(part.compact)
        back = torch.full_like(held, -1.0)
        part.scatter(part.compact, back)
        assert torch.equal(back[back >= 0], part.compact)
    assert torch.equal(torch.cat(found), whole.view(ROWS, WIDTH)[SELECTED].flatten())
