"""The memory layer: y = Wv( sum over picked rows of score * <pre_row, Wp x> * row ).

``MemoryLayer`` joins the parts: ``Retrieval`` (or ``ProductKeys``) picks cells, the shuffle and the window turn cells
into rows of a value table, a lookup of ``ops/`` adds the rows up, and the value projection returns to the hidden size.
Its input is the normalised input of the block's FFN, its output is added to the FFN's. docs/memory-layer.md has the
equations.

Letters: T tokens, H hidden, h heads, K values kept per head, C cores, E virtual blocks with a projection of their own,
V rows of the window, A rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import TableShard
from umv2_megatron.memory.initialization import initialize_layer, seeded_generator
from umv2_megatron.memory.losses import attach_loss, tucker_penalty
from umv2_megatron.memory.product_keys import ProductKeys
from umv2_megatron.memory.retrieval import Picks, Projection, Retrieval
from umv2_megatron.memory.sharing import TableWindow, table_windows
from umv2_megatron.memory.table_layer import TableLayer
from umv2_megatron.memory.value_table import StartedLookup, ValueTable


@dataclass
class Started:
    """A forward that has been started: the lookup under way and what ``finish`` records."""

    shape: torch.Size
    lookup: StartedLookup
    picks: Picks
    virtual: Tensor
    gate: Optional[Tensor]
    """Wg x, [T, E * Dv], or None."""


class MemoryLayer(TableLayer):
    """One memory layer of UltraMemV2, UltraMem v1, Memory+, PKM or PEER; which one is a matter of ``config``.

    Parameters (all replicated, but for the table): those of ``retrieval``, ``pre_proj.weight`` [Dp, H] (with
    pre-values, unless pre_projection is none), ``gate_proj.weight`` [E * Dv, H] (with a gate), ``value_proj.weight``
    [H, E * Dv] (unless value_expansion is none), and, in the layer that owns it, ``table.values`` [A, Dv] and
    ``table.pre_values`` [A, Dp].
    Buffers: ``perm`` [N^2], the shuffle; with Tucker scores ``retrieval.u`` and ``retrieval.t``.

    Args:
        config: sizes and switches, validated.
        hidden_size: H.
        layer_index: 0-based among the memory layers of the whole model; seeds the shuffle and the initialisation.
        num_memory_layers: memory layers of the whole model.
        ffn_hidden_size: inner size of the FFN beside it, whose output variance the layer starts with.
        num_layers: blocks of the whole model, for the same purpose.
        window: the rows this layer sees; None computes it from ``config``.
        table: the table of the layer that owns it, when another one does; None creates it here.
        params_dtype: dtype of all parameters.
        device: where to build; "meta" builds shapes only.
        sequence_parallel: whether each tensor-parallel rank sees its own part of the sequence; the replicated
            parameters are then marked so that mcore sums their gradients over those ranks.
        perform_initialization: False leaves parameters unset (they will be loaded).
        ffn_gated, ffn_activation: that FFN's form, see ``ffn_output_variance``.
        shard: this rank's part of the table, None for the whole.
    """

    perm: Tensor

    def __init__(
        self,
        config: MemoryConfig,
        hidden_size: int,
        layer_index: int,
        num_memory_layers: int,
        ffn_hidden_size: int,
        num_layers: int,
        window: Optional[TableWindow] = None,
        table: Optional[ValueTable] = None,
        params_dtype: torch.dtype = torch.float32,
        device: Optional[torch.device | str] = None,
        sequence_parallel: bool = False,
        perform_initialization: bool = True,
        ffn_gated: bool = True,
        ffn_activation: str | Callable[[Tensor], Tensor] = "silu",
        shard: Optional[TableShard] = None,
    ) -> None:
        window = window or table_windows(config, num_memory_layers)[layer_index]
        super().__init__(config, hidden_size, layer_index, window, sequence_parallel)
        options: dict[str, Any] = {"dtype": params_dtype, "device": device}
        num_keys = config.key_expansion * self.window.side
        kind = Retrieval if config.scoring == "tucker" else ProductKeys
        self.retrieval: Retrieval | ProductKeys = kind(config, hidden_size, num_keys, params_dtype, device)
        self.pre_proj = Projection(hidden_size, config.pre_value_dim, **options) if config.has_pre_projection else None
        self.gate_proj = Projection(hidden_size, config.gate_rows, **options) if config.gate != "none" else None
        self.value_proj = None
        if config.value_expansion != "none":
            self.value_proj = Projection(config.summed_dim, hidden_size, **options)
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.register_buffer("perm", torch.empty(num_keys**2, dtype=index_dtype(num_keys**2), device=device))

        name = f"memory layer {layer_index}"
        self.take_table(table, lambda: ValueTable(config, self.window.rows, params_dtype, device, shard, name))

        if not self.perm.is_meta:
            self.shuffle()
            if perform_initialization:
                initialize_layer(self, ffn_hidden_size, num_layers, ffn_gated, ffn_activation)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., H], the normalised FFN input, to [..., H], to be added to the FFN's output."""
        return self.finish(self.start(x))

    def start(self, x: Tensor) -> Started:
        """Pick rows for ``x`` [..., H] and start to exchange them; the FFN may be computed before ``finish``."""
        flat = x.reshape(-1, self.hidden_size)
        projected = None
        if self.config.has_pre_values:
            projected = self.pre_proj(flat) if self.pre_proj is not None else flat
        gathered = self.table.gather(flat, projected)
        picks: Picks = self.retrieval(flat)
        virtual = self.perm[picks.grid].long()
        rows, block = self.window.locate(virtual, self.config.key_expansion**2)
        if self.row_counts is not None:
            self.row_counts.index_add_(0, rows.flatten(), torch.ones_like(rows.flatten()))
        lookup = self.table.start(rows, block, picks.scores, gathered)
        gate = self.gate_proj(flat) if self.gate_proj is not None else None
        return Started(x.shape, lookup, picks, virtual, gate)

    def finish(self, started: Started) -> Tensor:
        """The layer's output [..., H] for the input of ``start``."""
        summed = self.table(started.lookup)
        if started.gate is not None:
            summed = summed * functional.silu(started.gate)
        output = self.value_proj(summed) if self.value_proj is not None else summed
        if self.training and torch.is_grad_enabled():
            # Under activation recompute the first forward has no gradients, so each token is counted once.
            picks = started.picks
            output = self._with_losses(output, picks.balance)
            if self.statistics is not None:
                self.statistics.record(started.virtual % self.window.window, picks.scores, output)
                self.statistics.served_picks += getattr(started.lookup, "received", 0)
        return output.view(started.shape)

    def _with_losses(self, output: Tensor, balance: Optional[Tensor]) -> Tensor:
        """Hang the auxiliary losses on ``output`` and keep their values for the log."""
        losses: dict[str, Tensor] = {}
        if balance is not None:
            losses["balance_loss"] = self.config.balance_loss_coeff * balance
        if self.config.tucker_penalty_coeff > 0:
            assert isinstance(self.retrieval, Retrieval), "a penalty on cores that are not there"
            penalty = tucker_penalty(self.retrieval.cores, self.config.tucker_penalty_margin)
            losses["tucker_penalty"] = self.config.tucker_penalty_coeff * penalty
        for loss in losses.values():
            output = attach_loss(output, loss, self.loss_scale)
        self.last_losses = {name: loss.detach() for name, loss in losses.items()}
        return output

    @torch.no_grad()
    def shuffle(self) -> None:
        """Fill ``perm`` with the permutation that belongs to the seed and this layer; equal on all ranks."""
        generator = seeded_generator(self.config.seed, "perm", self.layer_index)
        self.perm.copy_(torch.randperm(self.perm.numel(), generator=generator))


def index_dtype(cells: int) -> torch.dtype:
    """int32 where it can number ``cells`` cells: the shuffles of all layers then take half the memory."""
    return torch.int32 if cells <= 2**31 else torch.int64
