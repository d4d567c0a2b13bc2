"""RowAdam against a slow loop over rows in float64, and the matrices that a range of elements is cut into."""

from __future__ import annotations

import pytest
import torch

from umv2_megatron.memory.row_adam import ROW_MOMENT, RowAdam, TableRange

ROWS, COLUMNS, STEPS = 7, 6, 5
LR, BETAS, EPS = 0.01, (0.9, 0.95), 1e-6


def gradients(step: int) -> torch.Tensor:
    """[ROWS, COLUMNS] of one step; rows that nobody picked are zero, others in every second step, one never is."""
    drawn = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(step))
    drawn[1] = 0
    drawn[2 + step % 2 :: 2] = 0
    drawn[0] *= 1e-4
    return drawn


def slow(start: torch.Tensor, decay: float, decoupled: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(parameters, first moments, second moments by row) after STEPS steps, one number at a time in float64."""
    table = start.double().tolist()
    first = [[0.0] * COLUMNS for _ in range(ROWS)]
    second = [0.0] * ROWS
    for step in range(1, STEPS + 1):
        gradient = gradients(step).double().tolist()
        for r in range(ROWS):
            if not decoupled:
                gradient[r] = [g + decay * p for g, p in zip(gradient[r], table[r], strict=True)]
            mean = sum(g * g for g in gradient[r]) / COLUMNS
            second[r] = BETAS[1] * second[r] + (1 - BETAS[1]) * mean
            for j in range(COLUMNS):
                first[r][j] = BETAS[0] * first[r][j] + (1 - BETAS[0]) * gradient[r][j]
                if decoupled:
                    table[r][j] -= LR * decay * table[r][j]
                hat, row_hat = first[r][j] / (1 - BETAS[0] ** step), second[r] / (1 - BETAS[1] ** step)
                table[r][j] -= LR * hat / (row_hat**0.5 + EPS)
    return tuple(torch.tensor(each, dtype=torch.float64) for each in (table, first, second))  # type: ignore[return-value]


def trained(held: list[torch.Tensor], ranges: list[TableRange], decay: float, decoupled: bool = True) -> RowAdam:
    """The optimizer of ``held`` after STEPS steps; with several ranges of one table, their shared rows are added up."""
    group = {"params": held, "lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": decay}
    optimizer = RowAdam([group], ranges, decoupled)
    for step in range(1, STEPS + 1):
        for tensor, part in zip(held, ranges, strict=True):
            whole = gradients(step).view(-1)
            tensor.grad = whole[part.start : part.start + tensor.numel()].view_as(tensor).clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("decay, decoupled", [(0.0, True), (0.3, True), (0.3, False)])
@pytest.mark.parametrize("flat", [False, True])
def test_against_a_slow_loop(decay: float, decoupled: bool, flat: bool) -> None:
    start = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    held = start.view(-1).clone() if flat else start.clone()
    optimizer = trained([held], [TableRange(held, COLUMNS, COLUMNS)], decay, decoupled)
    table, first, second = slow(start, decay, decoupled)
    state = optimizer.state[held]
    assert state[ROW_MOMENT].shape == (ROWS,) and state["exp_avg"].shape == held.shape
    for ours, theirs in ((held, table), (state["exp_avg"], first), (state[ROW_MOMENT], second)):
        # absolute: float32 numbers that nearly cancel, in the order of sums of the CPU at hand
        torch.testing.assert_close(ours.double().view(-1), theirs.view(-1), rtol=2e-6, atol=2e-8)
    assert optimizer.param_groups[0]["step"] == STEPS


def test_a_row_that_is_never_picked_only_decays() -> None:
    held = torch.ones(ROWS, COLUMNS)
    trained([held], [TableRange(held, COLUMNS, COLUMNS)], 0.3)
    torch.testing.assert_close(held[1], torch.full((COLUMNS,), (1 - LR * 0.3) ** STEPS))


def test_one_column_is_adam() -> None:
    """With one column per row the mean is over one number: torch's AdamW."""
    start = torch.randn(ROWS * COLUMNS, 1, generator=torch.Generator().manual_seed(0))
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    trained([ours], [TableRange(ours, 1, 1)], 0.1)
    adam = torch.optim.AdamW([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1)
    for step in range(1, STEPS + 1):
        theirs.grad = gradients(step).view(-1, 1)
        adam.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=2e-6, atol=1e-7)


def test_ranges_that_cut_through_rows() -> None:
    """One optimizer over three ranges of a table, two of whose cuts are inside rows, one row in all three."""
    start = torch.randn(ROWS * COLUMNS, generator=torch.Generator().manual_seed(0))
    cuts = [0, 2 * COLUMNS + 1, 2 * COLUMNS + 3, ROWS * COLUMNS]
    held = [start[a:b].clone() for a, b in zip(cuts, cuts[1:], strict=False)]
    ranges = [TableRange(each, COLUMNS, COLUMNS, a) for each, a in zip(held, cuts, strict=False)]
    assert [(each.first, each.rows, each.begins_inside) for each in ranges] == [
        (0, 3, False), (2, 1, True), (2, 5, True)
    ]  # fmt: skip
    group = {"params": held, "lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.3}
    optimizer = RowAdam([group], ranges, True)
    # each range has a number of its own here; on ranks all would be number 0, added up by the collective
    optimizer.share_rows(3, [0, 1, 2], [2, 3, 4], lambda sums: sums.fill_(sums.sum()))
    for step in range(1, STEPS + 1):
        for tensor, part in zip(held, ranges, strict=True):
            tensor.grad = gradients(step).view(-1)[part.start : part.start + tensor.numel()]
        optimizer.step()
    table, _first, second = slow(start.view(ROWS, COLUMNS), 0.3, True)
    torch.testing.assert_close(torch.cat(held).double(), table.view(-1), rtol=2e-6, atol=1e-9)
    for tensor, part in zip(held, ranges, strict=True):
        expected = second[part.first : part.first + part.rows]
        torch.testing.assert_close(optimizer.state[tensor][ROW_MOMENT].double(), expected, rtol=2e-6, atol=1e-12)


def test_blocks_are_the_range_in_order() -> None:
    whole = torch.arange(ROWS * COLUMNS)
    for start in range(ROWS * COLUMNS + 1):
        for stop in range(start, ROWS * COLUMNS + 1):
            part = TableRange(whole[start:stop], COLUMNS, COLUMNS, start)
            reached = 0
            assert len(part.blocks()) <= 3
            for elements, rows, width in part.blocks():
                assert elements.start == reached
                reached = elements.stop
                found = part.held[elements].view(-1, width) // COLUMNS - part.first
                assert (found == torch.arange(rows.start, rows.stop)[:, None]).all()
            assert reached == stop - start
