"""Where the rows of the memory layers' tables lie: with the model, in host memory, or in the files.

A token reads a few rows of a table that may be larger than the machine's memory. ``memory_tables`` says where it lies:

    device    parameters like all others (the default; the only form in which tables are trained)
    cpu       host memory, pinned where there is CUDA; only picked rows go to the device
    mmap      the safetensors files of the model, mapped; only picked rows are ever read

A table is held in chunks of ``config.memory_table_chunk_rows`` rows, because a file has a largest size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_umv2 import UMv2Config

PLACES = ("device", "cpu", "mmap")
KINDS = ("values", "pre_values")


class UMv2Table(nn.Module):
    """A value table: ``values.C`` and ``pre_values.C`` for chunks C = 0, 1, ..., each [rows of the chunk, Dv or Dp].

    Args:
        config: of the model.
        rows: A, of the whole table.
        place: one of ``PLACES``. Off the device there are no parameters; the chunks come by ``attach``.
    """

    def __init__(self, config: UMv2Config, rows: int, place: str) -> None:
        super().__init__()
        self.rows = rows
        self.place = place
        self.chunk_rows = min(config.memory_table_chunk_rows or rows, rows)
        self.widths = {"values": config.memory_value_dim, "pre_values": config.memory_pre_value_dim}
        if place == "device":
            for kind, width in self.widths.items():
                if width:
                    chunks = [nn.Parameter(torch.empty(*shape)) for shape in self.chunk_shapes(kind)]
                    setattr(self, kind, nn.ParameterList(chunks))

    def chunk_shapes(self, kind: str) -> list[tuple[int, int]]:
        """Rows and columns of each chunk of ``kind``."""
        starts = range(0, self.rows, self.chunk_rows)
        return [(min(self.chunk_rows, self.rows - start), self.widths[kind]) for start in starts]

    def announce(self, rows: Tensor) -> None:
        """``rows`` will be picked soon."""

    def pick(self, kind: str, rows: Tensor) -> Tensor:
        """``rows`` [n] of the table, [n, Dv or Dp], on the device of ``rows``."""
        chunks = getattr(self, kind)
        if len(chunks) == 1:
            return functional.embedding(rows, chunks[0])
        picked = chunks[0].new_empty(rows.shape[0], self.widths[kind])
        chunk_of = rows.div(self.chunk_rows, rounding_mode="floor")
        for index, chunk in enumerate(chunks):
            (place,) = (chunk_of == index).nonzero(as_tuple=True)
            if place.numel():
                own = functional.embedding(rows[place] - index * self.chunk_rows, chunk)
                picked = picked.index_copy(0, place, own)
        return picked
