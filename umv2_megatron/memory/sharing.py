"""Which memory layers share which value table, and which rows of it each of them sees.

Every memory layer brings n = N*N rows. A layer that sees g layers' worth of rows has a window of
V = floor(sqrt(g * n))^2 rows (a square, because rows are addressed by a pair of keys) that starts at ``offset``:

- none: a table of n rows for each layer.
- block(g): groups of g consecutive layers share a table of g*n rows; layer i starts at (i mod g)*n and wraps.
- ring(g): one table of L*n rows; layer i starts at i*n and wraps (arXiv 2508.18756, share ratio g/L).
- noring(g): one table of L*n rows; layer i sees the g layers around it, starting at layer clip(i - g//2, 0, L - g).

Block is the pattern that fits pipeline parallelism, because a table never leaves its group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

from torch import Tensor

from umv2_megatron.config.memory_config import MemoryConfig


@dataclass(frozen=True)
class TableWindow:
    """The part of a value table that one memory layer sees."""

    owner: int
    """0-based index, among the memory layers, of the layer that owns the table (the first that uses it)."""
    rows: int
    """A: rows of the whole table."""
    offset: int
    """Row of the table where the window starts."""
    window: int
    """V: rows of the window, a square number; the window wraps round at row A."""

    def __post_init__(self) -> None:
        assert math.isqrt(self.window) ** 2 == self.window, f"a window of {self.window} rows is no square"
        assert 0 < self.window <= self.rows and 0 <= self.offset < self.rows, self

    @property
    def side(self) -> int:
        """sqrt(V)."""
        return math.isqrt(self.window)

    def locate(self, virtual: Tensor, blocks: int = 0) -> tuple[Tensor, Optional[Tensor]]:
        """Virtual cells (any shape, int64) to (rows of the table in [0, A), virtual block = cell // V).

        ``blocks``: how many virtual blocks there are, 0 for any number. With one, cells are below V, and None stands
        for its number.
        """
        if blocks == 1:
            if self.offset == 0:
                return virtual, None
            rows = virtual + self.offset
            return (rows % self.rows if self.offset + self.window > self.rows else rows), None
        block = virtual // self.window
        return (virtual - block * self.window + self.offset) % self.rows, block


def table_windows(config: MemoryConfig, num_memory_layers: int) -> list[TableWindow]:
    """The window of each of the ``num_memory_layers`` layers under the sharing pattern of ``config``."""
    rows, layers, seen = config.rows_per_layer, num_memory_layers, config.effective_sharing_size
    window = config.window_rows
    if config.sharing == "none":
        return [TableWindow(layer, rows, 0, window) for layer in range(layers)]
    if config.sharing == "block":
        return [
            TableWindow(layer - layer % seen, seen * rows, (layer % seen) * rows, window) for layer in range(layers)
        ]
    if config.sharing == "ring":
        return [TableWindow(0, layers * rows, layer * rows, window) for layer in range(layers)]
    assert config.sharing == "noring", config.sharing
    starts = [min(max(layer - seen // 2, 0), layers - seen) for layer in range(layers)]
    return [TableWindow(0, layers * rows, start * rows, window) for start in starts]


def from_share_ratio(num_keys: int, num_layers: int, share_ratio: float) -> list[TableWindow]:
    """Windows in the terms of the released code: a ring in which each layer sees ``share_ratio`` of the table.

    With ``share_ratio`` = g / L this is ring(g); other ratios need not be a whole number of layers.
    """
    rows = num_layers * num_keys**2
    side = math.floor(math.sqrt(rows * share_ratio))
    return [TableWindow(0, rows, layer * num_keys**2, side * side) for layer in range(num_layers)]
