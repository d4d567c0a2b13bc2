"""What every layer with a value table has: the table, its checkpoint form, what it counts and its auxiliary losses.

``MemoryLayer`` searches for rows with queries and keys, ``EngramLayer`` hashes tokens. Both are started before the FFN
of their block computes and finished behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.losses import microbatch_scale
from umv2_megatron.memory.sharing import TableWindow
from umv2_megatron.memory.statistics import UsageStatistics
from umv2_megatron.memory.value_table import ValueTable


class TableLayer(nn.Module):
    """The common part; ``window`` are the rows that the layer sees, ``table`` where they lie."""

    retrieval: Any
    """What searches for rows; None where nothing does. (No value here: it would hide a registered module.)"""

    def __init__(
        self, config: MemoryConfig, hidden_size: int, layer_index: int, window: TableWindow, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.layer_index = layer_index
        self.window = window
        self.sequence_parallel = sequence_parallel
        self.loss_scale: Callable[[], float] = lambda: microbatch_scale(self.sequence_parallel)
        """Called in the backward: what the auxiliary losses are multiplied by. Replace it in other schedules."""
        self.last_losses: dict[str, Tensor] = {}
        """Detached "balance_loss" and "tucker_penalty" of the last training forward, times their coefficients."""
        self.statistics: Optional[UsageStatistics] = None
        self.row_counts: Optional[Tensor] = None
        """[A] int64: where it is set, every forward adds how often it picked each row of the table."""
        self.owns_table = True

    def take_table(self, table: Optional[ValueTable], make: Callable[[], ValueTable]) -> None:
        """Use ``table``, that of another layer, or where it is None one that ``make`` gives, and own it."""
        self.owns_table = table is None
        if table is None:
            self.table = make()
        else:
            assert table.rows == self.window.rows, f"a table of {table.rows} rows for {self.window}"
            # Past nn.Module's registration, so that state_dict and named_parameters hold the table once.
            object.__setattr__(self, "table", table)

    def finish(self, started: Any) -> Tensor:
        """What is to be added to the FFN's output, for what ``start`` of the same layer gave."""
        raise NotImplementedError

    def sort_ahead(self, started: Any) -> None:
        """See ``ValueTable.sort_ahead``; for a ``started`` that is finished."""
        if self.training:
            self.table.sort_ahead(started.lookup)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Optional[dict] = None
    ) -> ShardedStateDict:
        """For mcore's checkpoints: everything is the same on all ranks of the stage, but for the table's parts."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        replicated = {
            name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if not name.startswith("table.")
        }
        state = make_sharded_tensors_for_checkpoint(
            replicated, prefix, {}, sharded_offsets, dp_cp_group=metadata["dp_cp_group"],
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )  # fmt: skip
        if self.owns_table:
            state.update(self.table.sharded_state_dict(f"{prefix}table.", sharded_offsets, metadata))
        return state

    def refresh_singular_vectors(self) -> None:
        """See ``Retrieval.refresh_singular_vectors``: once per optimizer step, at build and after load. Only Tucker
        scores have any."""
        if self.retrieval is not None:
            self.retrieval.refresh_singular_vectors()

    def singular_values(self) -> Tensor:
        """Of the cores, [h, R]; [h, 0] where there are none."""
        return torch.zeros(self.config.num_heads, 0) if self.retrieval is None else self.retrieval.singular_values()

    def collect_statistics(self, enabled: bool) -> None:
        """Start counting afresh with the next training forward, or stop; off costs nothing."""
        device = self.table.values.device
        self.statistics = UsageStatistics(self.window.window, self.config.num_heads, device) if enabled else None
