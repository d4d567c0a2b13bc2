"""The rows that memory layers look up: values [A, Dv] and, for PEER, pre-values [A, Dp].

A table is owned by one memory layer and referenced by the others that share it. Its parameters carry the marks by
which mcore treats them as shards of their own group of ranks (see docs/memory-layer.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.ops import get_backend


class ValueTable(nn.Module):
    """A value table of ``rows`` rows; ``values`` [A, Dv] and ``pre_values`` [A, Dp] or None, uninitialised.

    Args:
        config: sizes Dv and Dp.
        rows: A.
        params_dtype: dtype of both tables.
        device: where they live; None for torch's default.
    """

    def __init__(
        self,
        config: MemoryConfig,
        rows: int,
        params_dtype: torch.dtype = torch.float32,
        device: Optional[torch.device | str] = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.rows = rows
        self.initial_std: Optional[float] = None
        """Standard deviation the rows were drawn with under the "paper" initialisation; sharing layers read it."""
        self.values = nn.Parameter(torch.empty(rows, config.value_dim, dtype=params_dtype, device=device))
        self.pre_values: Optional[nn.Parameter] = None
        if config.has_pre_values:
            self.pre_values = nn.Parameter(torch.empty(rows, config.pre_value_dim, dtype=params_dtype, device=device))
        for table in self.tables():
            mark_as_memory_table(table)

    def forward(
        self, rows: Tensor, blocks: Optional[Tensor], scores: Tensor, projected: Optional[Tensor]
    ) -> Tensor:
        """Look rows up and add them: [T, E * Dv]; arguments as in ``ops.interface.TableLookup``.

        Being a forward of the module that holds the parameters, it triggers mcore's hooks that wait for parameters
        that are gathered while the forward runs (--overlap-param-gather), in every layer that uses the table.
        """
        config = self.config
        # Asked for at every call, because mcore may build a model on the CPU and move it.
        lookup = get_backend(config.backend, rows.device)
        return lookup(
            rows,
            blocks if config.num_blocks > 1 else None,
            scores,
            projected,
            self.pre_values,
            self.values,
            config.num_blocks,
            config.pre_value_activation,
        )

    def tables(self) -> Iterator[nn.Parameter]:
        """The parameters of this table, values first."""
        yield self.values
        if self.pre_values is not None:
            yield self.pre_values


def mark_as_memory_table(parameter: nn.Parameter) -> None:
    """Put the marks on ``parameter`` that mcore and our optimizer set-up read.

    ``allreduce = False``: mcore's DDP and optimizer reduce it over the expert data-parallel group (the ranks that
    hold the same shard) instead of over all ranks. ``tensor_model_parallel``: every tensor-parallel rank counts
    its shard in the gradient norm; without it the norm silently misses the shards of ranks above 0.
    ``is_memory_table``: our parameter group with a learning rate of its own.
    """
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.is_memory_table = True  # type: ignore[attr-defined]
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
