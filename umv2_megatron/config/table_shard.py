"""Which part of a value table one rank of a memory-parallel group holds.

    dim   every rank holds all rows and a slice of the columns: of Dv columns, rank m of M has those from m*Dv/M
    row   every rank holds whole rows, a contiguous range of them: of A rows, rank m has those from floor(m*A/M)

Arithmetic only: the layer, the checkpoints and the planner all ask here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MODES = ("dim", "row")


@dataclass(frozen=True)
class TableShard:
    """Part ``rank`` of ``size`` (M) equal parts of every value table; the default is the whole table."""

    mode: str = "dim"
    size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        assert self.mode in MODES, self.mode
        assert 0 <= self.rank < self.size, self

    @property
    def by_row(self) -> bool:
        """Whether rows, and not columns, are shared out (False for a whole table)."""
        return self.mode == "row" and self.size > 1

    @property
    def by_dim(self) -> bool:
        """Whether columns are shared out (False for a whole table)."""
        return self.mode == "dim" and self.size > 1

    def rows(self, total: int) -> tuple[int, int]:
        """(first row, row after the last) of a table of ``total`` rows; parts differ by one row at most."""
        if not self.by_row:
            return 0, total
        return self.rank * total // self.size, (self.rank + 1) * total // self.size

    def columns(self, total: int) -> tuple[int, int]:
        """(first column, column after the last) of a table ``total`` columns wide; M divides ``total`` in dim mode."""
        if not self.by_dim:
            return 0, total
        assert total % self.size == 0, f"{total} columns over {self.size} ranks"
        return self.rank * total // self.size, (self.rank + 1) * total // self.size

    def cores(self, value_dim: int, num_cores: int) -> list[int]:
        """For each equal slice of this rank's value columns, the core that scales it.

        In dim mode a rank's Dv/M columns need not be those of whole cores (Dv/C columns each). They are cut into
        slices of gcd(Dv/M, Dv/C) columns, so that each slice lies in one core: one slice when M is a multiple of C,
        C/M slices when C is a multiple of M.
        """
        start, stop = self.columns(value_dim)
        core_columns = value_dim // num_cores
        slice_columns = math.gcd(stop - start, core_columns)
        return [column // core_columns for column in range(start, stop, slice_columns)]



def rows_of_range(start: int, stop: int, columns: int) -> tuple[int, int]:
    """(first row, row after the last) of a table ``columns`` wide that have some of its elements [start, stop), in
    row-major order; an empty range has none, (0, 0)."""
    return (start // columns, -(-stop // columns)) if start < stop else (0, 0)
