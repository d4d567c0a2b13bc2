"""Memory layers that are new in a trained model: their tensors by rows, as training would begin with them.

The numbers are those of a run from scratch with the same ``--memory-*`` flags, whatever is asked for first: queries,
keys, cores and projections of one layer are in memory at a time, and tables are drawn row by row. A silent layer has
zeros in the projection of its values (in the values themselves where it has none), so that its output is exactly zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn import functional

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.initialization import draw_table_rows, initialize_layer
from umv2_megatron.memory.layer import MemoryLayer
from umv2_megatron.memory.sharing import table_windows
from umv2_megatron.memory.value_table import ValueTable


class NewMemory:
    """The memory layers of a model with the decoder's settings ``values`` (by key); ``dtype`` is that of the weights,
    ``silent`` starts them without an effect."""

    def __init__(self, memory: MemoryConfig, values: dict[str, Any], dtype: torch.dtype, silent: bool) -> None:
        # one table on one rank, whatever the flags say of a run
        self.config = dataclasses.replace(memory, parallel_size=1)
        self.values = values
        self.dtype = dtype
        self.silent = silent
        here = memory.memory_layers(values["num_layers"])
        self._numbers = {block: sum(here[:block]) for block, has in enumerate(here) if has}
        self._windows = table_windows(self.config, len(self._numbers))
        self._stds: dict[int, float] = {}
        self._last: tuple[int, dict[str, torch.Tensor]] | None = None

    def rows(self, block: int, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor ``name`` (as in ``MemoryLayer.state_dict``) of the layer in ``block``."""
        if name.startswith("table."):
            return self._table_rows(block, name.removeprefix("table."), start, stop)
        if self._last is None or self._last[0] != block:
            self._last = (block, self._made(self._numbers[block]))
        rows = self._last[1][name][start:stop].contiguous()
        return torch.zeros_like(rows) if self.silent and name == "value_proj.weight" else rows

    def _table_rows(self, block: int, name: str, start: int, stop: int) -> torch.Tensor:
        columns = self.config.value_dim if name == "values" else self.config.pre_value_dim
        rows = torch.zeros(stop - start, columns, dtype=self.dtype)
        if not (self.silent and name == "values" and self.config.value_expansion == "none"):
            number = self._numbers[block]
            draw_table_rows(rows, self.config, number, name, start, self._std(number))
        return rows

    def _std(self, number: int) -> float:
        """Standard deviation of the table that memory layer ``number`` owns."""
        if number not in self._stds:
            self._made(number)
        return self._stds[number]

    @torch.no_grad()
    def _made(self, number: int) -> dict[str, torch.Tensor]:
        """All tensors but the table's of memory layer ``number``."""
        window = self._windows[number]
        table = ValueTable(self.config, window.rows, self.dtype, "meta")
        if window.owner != number:
            table.initial_std = self._std(window.owner)
        decoder = {"ffn_hidden_size": self.values["ffn_hidden_size"], "num_layers": self.values["num_layers"]}
        layer = MemoryLayer(
            self.config, self.values["hidden_size"], number, len(self._windows), **decoder,
            window=window, table=table, params_dtype=self.dtype, device="cpu", perform_initialization=False,
        )  # fmt: skip
        layer.owns_table = window.owner == number
        gated = self.values["swiglu"]
        activation = functional.silu if gated else functional.gelu
        initialize_layer(layer, **decoder, ffn_gated=gated, ffn_activation=activation)
        if layer.owns_table:
            assert table.initial_std is not None
            self._stds[number] = table.initial_std
        return {name: tensor.detach() for name, tensor in layer.state_dict().items()}
