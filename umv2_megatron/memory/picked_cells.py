"""A pick in one integer, as it travels between ranks: row and virtual block together, in 4 bytes where they fit.

cell = row * E + block, with E virtual blocks that have a projection of their own (1: the row itself).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def encode(rows: Tensor, blocks: Optional[Tensor], num_blocks: int, largest: int) -> Tensor:
    """Cells of ``rows`` and ``blocks`` (any shape, int64); ``largest``: rows are below this number."""
    cells = rows
    if num_blocks > 1:
        assert blocks is not None, "several blocks need the block of each pick"
        cells = torch.add(blocks, rows, alpha=num_blocks)
    return cells.to(torch.int32 if largest * num_blocks <= 2**31 else torch.int64)


def decode(cells: Tensor, num_blocks: int) -> tuple[Tensor, Optional[Tensor]]:
    """(rows, blocks) int64 of what ``encode`` made; blocks are None when E is 1."""
    cells = cells.long()
    if num_blocks == 1:
        return cells, None
    rows = cells // num_blocks
    return rows, cells - rows * num_blocks
