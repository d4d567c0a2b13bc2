"""Adam with its state on the host against the same Adam without: the same bits, whatever the pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from umv2_megatron.memory.host_adam import HostAdam, HostRowAdam, HostTable, main_weights, placeholder
from umv2_megatron.memory.row_adam import RowAdam, TableRange

GROUP: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.3}
ROWS, COLUMNS, STEPS = 1003, 7, 4  # no multiple of a vector of any CPU
STARTS = [0, 3]  # of the range in the table: at the start of a row, and inside one


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(ROWS * COLUMNS, generator=torch.Generator().manual_seed(seed))


def tables(dtype: torch.dtype, start: int) -> list[HostTable]:
    """One table in ``dtype`` from its element ``start`` on, with float32 main weights where that is 16 bits."""
    whole = drawn(0)[start:]
    if dtype == torch.float32:
        return [HostTable(whole, whole, None)]
    main = whole.clone()
    return [HostTable(placeholder(main, torch.device("cpu")), whole.to(dtype), main)]


def steps(optimizer: Any, held: torch.Tensor, start: int) -> None:
    for step in range(1, STEPS + 1):
        held.grad = drawn(step)[start:]
        if step == 2 and hasattr(optimizer, "start"):
            optimizer.start()
        optimizer.step()


@pytest.mark.parametrize("piece", [64, 1024, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoupled", [True, False])
def test_the_bits_of_torch_s_fused_adam(decoupled: bool, dtype: torch.dtype, piece: int) -> None:
    theirs = torch.nn.Parameter(drawn(0))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    adam = kind([theirs], fused=True, **GROUP)
    for step in range(1, STEPS + 1):
        theirs.grad = drawn(step)
        adam.step()
    (table,) = tables(dtype, 0)
    ours = HostAdam([{"params": [table.held], **GROUP}], [table], decoupled, piece)
    steps(ours, table.held, 0)
    main = main_weights(ours, table.held)
    assert torch.equal(main, theirs) and torch.equal(table.weights, theirs.to(dtype))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ours.state[table.held][name], adam.state[theirs][name])
    assert ours.param_groups[0]["step"] == STEPS


@pytest.mark.parametrize("piece", [64, 1024, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", STARTS)
def test_the_bits_of_row_adam(start: int, dtype: torch.dtype, piece: int) -> None:
    theirs = drawn(0)[start:].clone()
    adam = RowAdam([{"params": [theirs], **GROUP}], [TableRange(theirs, COLUMNS, COLUMNS, start)], True)
    steps(adam, theirs, start)
    (table,) = tables(dtype, start)
    ranges = [TableRange(table.held, COLUMNS, COLUMNS, start)]
    ours = HostRowAdam([{"params": [table.held], **GROUP}], ranges, [table], piece=piece)
    steps(ours, table.held, start)
    assert torch.equal(main_weights(ours, table.held), theirs) and torch.equal(table.weights, theirs.to(dtype))
    for name, kept in ours.state[table.held].items():
        assert torch.equal(kept, adam.state[theirs][name]), name


def test_a_placeholder_has_the_attributes_and_no_memory() -> None:
    main = torch.randn(300, 5)
    main.tensor_model_parallel = True  # type: ignore[attr-defined]
    made = placeholder(main, torch.device("cpu"))
    assert made.shape == main.shape and made.untyped_storage().nbytes() == 4
    assert made.tensor_model_parallel is True  # type: ignore[attr-defined]
    made.grad = torch.ones(300, 5)  # as mcore does
    assert made.grad.is_contiguous()
