"""The least time in which this machine touches rows at random places of tables: the bound of the lookups.

Measured, not computed from a bandwidth: how fast random rows come depends on their size, the size of the table, the
caches and the pages, and a table in the last level of cache is faster than any copy. ``row_rates.cpp`` reads rows, or
reads and writes them, and does nothing with them; the fastest of several ways to ask for rows ahead of time counts.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from umv2_megatron.ops import cpu_build

AHEAD = (0, 8, 16, 32, 64, 128)
LEVELS = (1, 2)


class _Table(ctypes.Structure):
    """As in row_rates.cpp."""

    _fields_ = [("data", ctypes.c_void_p), ("row_bytes", ctypes.c_int64), ("add", ctypes.c_int64)]


@cache
def _library() -> ctypes.CDLL:
    return cpu_build.load("row_rates", [Path(__file__).with_name("row_rates.cpp")])


class RowRates:
    """Touches rows of ``read`` and of ``added``, tables with the same number of rows, contiguous.

    ``number`` is added to every 4 bytes; any but 0 changes the floats that are there, maybe to denormal ones."""

    def __init__(self, read: Sequence[Tensor], added: Sequence[Tensor], number: int = 0) -> None:
        self._number = number
        touched = [(table, False) for table in read] + [(table, True) for table in added]
        for table, _ in touched:
            assert table.is_contiguous() and table.shape[1] * table.element_size() % 4 == 0, table.shape
        each = [_Table(table.data_ptr(), table.shape[1] * table.element_size(), add) for table, add in touched]
        # all tables of a row together, or one table after the other
        self._orders = [[each], [[one] for one in each]] if len(each) > 1 else [[each]]
        self._rows, self._kept = touched[0][0].shape[0], touched
        self._ways = list(itertools.product(range(len(self._orders)), AHEAD, LEVELS))

    def seconds(self, picks: int, generator: torch.Generator) -> list[float]:
        """Of every way, for the distinct ones of ``picks`` rows at random, each once; others for every way, because
        those that were touched before are in a cache."""
        found = []
        for way in self._ways:
            rows = torch.randint(0, self._rows, (picks,), generator=generator).unique()
            found.append(self._once(rows[torch.randperm(len(rows), generator=generator)].contiguous(), *way))
        return found

    def _once(self, rows: Tensor, order: int, ahead: int, level: int) -> float:
        start = time.perf_counter()
        for tables in self._orders[order]:
            array = (_Table * len(tables))(*tables)
            _library().umv2_touch_rows(
                array, *map(ctypes.c_int64, (len(tables),)), ctypes.c_void_p(rows.data_ptr()),
                *map(ctypes.c_int64, (len(rows), ahead, level, torch.get_num_threads(), self._number)),
            )  # fmt: skip
        return time.perf_counter() - start
