"""Where a value table's gradient is added up: straight in mcore's ``main_grad``, without a dense gradient tensor.

How mcore learns of it: DDP hangs a hook on the parameter's gradient accumulator. Autograd runs the accumulator once
per backward, after every use of the parameter in the graph has contributed (a table shared by several layers has
several), even when the contributions are None. The hook wants ``param.grad`` to be set when reduction overlaps the
backward, skips adding it when ``grad_added_to_main_grad`` is True, and then drops it. So a backward returns None and
sets ``param.grad`` to a zero-stride tensor of the right shape that owns one element. Returning that tensor instead
would not do: the accumulator clones gradients with unusual strides into a dense tensor, and the engine adds those of
shared tables densely.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def gradient_sum(table: Tensor) -> Tensor:
    """Where the gradient of ``table`` is added up: its main_grad, or a new dense tensor without one."""
    main_grad = getattr(table, "main_grad", None)
    return main_grad if main_grad is not None else torch.zeros_like(table)


def hand_over(table: Optional[Tensor], total: Optional[Tensor]) -> Optional[Tensor]:
    """What autograd gets for ``table``: ``total``, the gradient itself, or None once it is in main_grad (see the top).

    ``table`` and ``total`` are None together where there is no table or nobody wants its gradient.
    """
    if table is None or total is None:
        return None
    if getattr(table, "main_grad", None) is None:
        return total
    table.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if table.grad is None:
        zero = getattr(table, "zero_gradient", None)
        if zero is None or zero.device != table.device or zero.dtype != table.dtype:
            # Kept with the table: to fill it is a launch.
            zero = table.zero_gradient = torch.zeros((), dtype=table.dtype, device=table.device)  # type: ignore[attr-defined]
        table.grad = zero.expand(table.shape)
    return None
