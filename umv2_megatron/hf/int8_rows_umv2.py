"""Rows of a value table in int8, with one scale for each row: a quarter of the bytes of float32, half of 16 bits.

A row of D numbers is D numbers of int8 and the four bytes of a float32, its scale: what is picked, moved to the device
or read from memory lies together, and no cast of the model's dtype rounds a scale. The largest number of a row becomes
127 or -127, so that no number is off by more than 1/254 of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SCALE_BYTES = 4
# Rows that are converted at once: what is held beside the table.
_ROWS_AT_ONCE = 1 << 14


@torch.no_grad()
def int8_rows(chunk: Tensor, pin: bool = False) -> Tensor:
    """``chunk`` [rows, D] of floating point as int8 [rows, D + 4], in host memory, pinned with ``pin``."""
    rows, size = chunk.shape
    made = torch.empty(rows, size + _SCALE_BYTES, dtype=torch.int8, pin_memory=pin)
    for first in range(0, rows, _ROWS_AT_ONCE):
        part = chunk[first : first + _ROWS_AT_ONCE].float()
        scales = part.abs().amax(1, keepdim=True) / 127
        numbers = (part / scales).nan_to_num(0).round().clamp(-127, 127)  # a row of zeros has a scale of 0
        into = made[first : first + _ROWS_AT_ONCE]
        into[:, :size] = numbers.to(torch.int8)
        into[:, size:] = scales.view(torch.int8)
    return made


def exact_rows(picked: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``picked`` [n, D + 4] stand for, [n, D] in ``dtype``."""
    size = picked.shape[1] - _SCALE_BYTES
    scales = picked[:, size:].contiguous().view(torch.float32)
    return (picked[:, :size] * scales).to(dtype)


__all__ = ["exact_rows", "int8_rows"]
