"""The rows that memory layers look up: values [A, Dv] and, for PEER, pre-values [A, Dp].

A table is owned by one memory layer and referenced by the others that share it. It may be shared out over the ranks of
the memory-parallel group, by column or by row (docs/memory-parallel.md); its parameters are then this rank's part. They
carry the marks by which mcore treats them as shards of their own group of ranks (see docs/memory-layer.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional, Union

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import TableShard
from umv2_megatron.memory import dim_sharded, row_sharded
from umv2_megatron.ops import get_backend
from umv2_megatron.ops.interface import PickOrder
from umv2_megatron.parallel import groups
from umv2_megatron.parallel.exchange import Exchange

TABLE_ATTRIBUTE = "is_memory_table"  # marks the parameters of value tables
VALUE_GROUP = "value_lr_mult"  # key of an optimizer's parameter group that holds value tables
TABLE_FAMILY = "table_family"
"""Attribute of the parameters of value tables, and key of the groups that hold those of n-gram layers beside other
memory layers: ``MemoryConfig.family``."""
SELECTED_ROWS = "selected_rows"  # key of such a group: SHA-256 of the file that names the only rows that learn


@dataclass
class WholeLookup:
    """A lookup in a whole table that has been started: its arguments, as in ``ops.interface.TableLookup``."""

    rows: Tensor
    blocks: Optional[Tensor]
    scores: Tensor
    projected: Optional[Tensor]
    order: PickOrder = field(default_factory=PickOrder)


StartedLookup = Union[WholeLookup, dim_sharded.Started, row_sharded.Started]
GatheredInputs = Union[Tensor, None, dim_sharded.Gathered, row_sharded.Gathered]


class ValueTable(nn.Module):
    """A value table of ``rows`` rows; ``values`` [A, Dv] and ``pre_values`` [A, Dp] or None, uninitialised.

    Sharded, the parameters are [rows of this rank, columns of this rank] (see ``TableShard``).

    Args:
        config: sizes Dv and Dp.
        rows: A, of the whole table.
        params_dtype: dtype of both tables.
        device: where they live; None for torch's default.
        shard: this rank's part; None for the whole table. More than one part needs mcore's process groups.
        name: of the layer that owns the table, for error messages.
    """

    def __init__(
        self,
        config: MemoryConfig,
        rows: int,
        params_dtype: torch.dtype = torch.float32,
        device: Optional[torch.device | str] = None,
        shard: Optional[TableShard] = None,
        name: str = "memory layer",
    ) -> None:
        super().__init__()
        self.config = config
        self.rows = rows
        self.shard = shard or TableShard()
        self.initial_std: Optional[float] = None
        """Standard deviation the rows were drawn with; layers that share them read it."""
        self.values = nn.Parameter(self._part(config.value_dim, params_dtype, device))
        self.pre_values: Optional[nn.Parameter] = None
        if config.has_pre_values:
            self.pre_values = nn.Parameter(self._part(config.pre_value_dim, params_dtype, device))
        for table in self.tables():
            mark_as_memory_table(table, config.family)
        self.exchange: Optional[Exchange] = None
        """What the parts of a sharded table exchange; None for a whole table."""
        self._sharded: Union[dim_sharded.DimShardedLookup, row_sharded.RowShardedLookup, None] = None
        if self.shard.size > 1:
            self.exchange = Exchange(groups.get_memory_parallel_group(), name)
            kind = row_sharded.RowShardedLookup if self.shard.by_row else dim_sharded.DimShardedLookup
            self._sharded = kind(config, rows, self.shard, self.exchange)

    def _part(self, columns: int, dtype: torch.dtype, device: Optional[torch.device | str]) -> Tensor:
        top, bottom = self.shard.rows(self.rows)
        left, right = self.shard.columns(columns)
        return torch.empty(bottom - top, right - left, dtype=dtype, device=device)

    def gather(self, x: Tensor, projected: Optional[Tensor]) -> GatheredInputs:
        """Begin to exchange the projected inputs [T, Dp] of the tokens ``x`` [T, H], for ``start``: they travel while
        rows are searched for. ``projected`` is None without pre-values. Nothing happens for a whole table."""
        return projected if self._sharded is None else self._sharded.gather(x, projected)

    def start(
        self, rows: Tensor, blocks: Optional[Tensor], scores: Tensor, gathered: GatheredInputs
    ) -> StartedLookup:
        """Begin a lookup; arguments as in ``ops.interface.TableLookup``, rows are those of the whole table, and
        ``gathered`` is what ``gather`` gave. ``blocks`` may be any numbers where E is 1.

        The exchanges of a sharded table are under way on return; the table itself is not touched yet. Every rank of the
        memory-parallel group must call this with the same number of tokens.
        """
        if self._sharded is None:
            return WholeLookup(rows, blocks, scores, gathered)  # type: ignore[arg-type]
        return self._sharded.start(rows, blocks, scores, gathered)  # type: ignore[arg-type]

    def forward(self, started: StartedLookup) -> Tensor:
        """Finish a lookup: the picked rows added up, [T, E * Dv].

        Being a forward of the module that holds the parameters, it triggers mcore's hooks that wait for parameters
        that are gathered while the forward runs (--overlap-param-gather), in every layer that uses the table.
        """
        if self._sharded is not None:
            return self._sharded.finish(started, self.pre_values, self.values)  # type: ignore[arg-type]
        assert isinstance(started, WholeLookup)
        config = self.config
        # Asked for at every call, because mcore may build a model on the CPU and move it.
        backend = get_backend(config.backend, started.rows.device, config.backward)
        return backend.lookup(
            started.rows,
            started.blocks if config.num_blocks > 1 else None,
            started.scores,
            started.projected,
            self.pre_values,
            self.values,
            config.num_blocks,
            config.pre_value_activation,
            **({"order": started.order} if backend.sort_ahead is not None else {}),
        )

    def sort_ahead(self, started: StartedLookup) -> None:
        """Sort the picks of a finished lookup for its backward, if that will sort them: a whole table's, by Triton's
        kernels. Costs memory until the backward, and is worth it on a stream on which nothing waits."""
        if not isinstance(started, WholeLookup):
            return
        backend = get_backend(self.config.backend, started.rows.device, self.config.backward)
        if backend.sort_ahead is not None and torch.is_grad_enabled() and self.values.requires_grad:
            backend.sort_ahead(started.rows, self.rows, started.order)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Optional[dict] = None
    ) -> ShardedStateDict:
        """For mcore's checkpoints: this rank's part of each table, and where it lies in the whole one [A, D].

        Any other layout finds its own parts in these. A whole table is stored as mcore stores any replicated tensor.
        """
        if self.shard.size == 1:
            return make_sharded_tensors_for_checkpoint(
                self.state_dict(keep_vars=True), prefix, {}, sharded_offsets,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
            )  # fmt: skip
        assert not sharded_offsets, f"tables of several layers under one key: {sharded_offsets}"
        replica = (0, 0, groups.get_memory_data_parallel_group().rank())
        widths = {"values": self.config.value_dim, "pre_values": self.config.pre_value_dim}
        return {
            prefix + name: ShardedTensor(
                prefix + name,
                part,
                part.dtype,
                tuple(part.shape),
                (self.rows, widths[name]),
                (self.shard.rows(self.rows)[0], self.shard.columns(widths[name])[0]),
                None,  # no grid: the parts need not be equally large
                replica,
            )
            for name, part in self.named_parameters()
        }

    def tables(self) -> Iterator[nn.Parameter]:
        """The parameters of this table, values first."""
        yield self.values
        if self.pre_values is not None:
            yield self.pre_values


def mark_as_memory_table(parameter: nn.Parameter, family: str = MemoryConfig.family) -> None:
    """Put the marks on ``parameter`` that mcore and our optimizer set-up read.

    ``allreduce = False``: mcore's DDP and optimizer reduce it over the expert data-parallel group (the ranks that
    hold the same shard) instead of over all ranks. ``tensor_model_parallel``: every tensor-parallel rank counts
    its shard in the gradient norm; without it the norm silently misses the shards of ranks above 0.
    ``TABLE_ATTRIBUTE``, and of which ``family``: our parameter group with a learning rate of its own.
    """
    parameter.allreduce = False  # type: ignore[attr-defined]
    setattr(parameter, TABLE_ATTRIBUTE, True)
    setattr(parameter, TABLE_FAMILY, family)
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
