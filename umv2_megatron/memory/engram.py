"""The n-gram layer of Engram (arXiv 2601.07372): rows that hashes of the last tokens address, and a gate.

    e     = the rows of all hashes, joined                                                   [E * Dv]
    k, v  = Wk e, Wv e                                                                       [H]
    alpha = sigmoid( sign(z) sqrt|z| ),   z = < norm(x), norm(k) > / sqrt(H)
    y     = u + SiLU( conv( norm(u) ) ),  u = alpha v

``conv`` is causal and depthwise, with taps ``ngram_size`` tokens apart, and starts at zero. The signed root is that of
the authors' demo; the equation of the paper has none. Which rows is known from token ids alone (``ngrams.py``); as of
every memory layer their exchange starts before the FFN of the block computes. The layer reads what every memory layer
of this package reads, the normalised input of its block's FFN, and its output is added to the FFN's: docs/variants.md
compares that with the published place.

Letters: T tokens, H hidden, h heads (hashes of all n-gram lengths together), E = h, n longest n-gram.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import TableShard
from umv2_megatron.memory.initialization import initialize_engram
from umv2_megatron.memory.ngrams import addresses, check_contexts, draw_multipliers, reach_of
from umv2_megatron.memory.retrieval import Projection, at_least_float32
from umv2_megatron.memory.sharing import TableWindow, table_windows
from umv2_megatron.memory.table_layer import TableLayer
from umv2_megatron.memory.value_table import StartedLookup, ValueTable

LEAST_ROOT = 1e-6
"""|z| below this has the root of this, whose slope would be endless (the demo's number)."""


@dataclass
class Started:
    """A forward that has been started."""

    x: Tensor
    """[T, H]"""
    rows: Tensor
    """[T, h]"""
    lookup: StartedLookup


class EngramLayer(TableLayer):
    """One n-gram layer.

    Parameters (all replicated, but for the table): ``key_proj.weight`` and ``value_proj.weight`` [H, E * Dv];
    ``query_norm`` and ``key_norm`` [H]; with a convolution ``conv_norm`` [H] and ``conv`` [H, taps], the last one that
    of the token itself; ``table.values`` [A, Dv].
    Buffers: ``multipliers`` [n] int64 of the hashes; ``canonical`` [vocabulary], the canonical id of each id: the ids
    themselves until ``set_canonical`` or a checkpoint says others.

    Args:
        vocabulary: number of ids.
        others: as of ``MemoryLayer``.

    Raises:
        ValueError: a context of ``ngram_size`` ids does not fit into 63 bits.
    """

    retrieval = None
    multipliers: Tensor
    canonical: Tensor

    def __init__(
        self,
        config: MemoryConfig,
        hidden_size: int,
        layer_index: int,
        num_memory_layers: int,
        ffn_hidden_size: int,
        num_layers: int,
        vocabulary: int,
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
        check_contexts(config, vocabulary)
        self.vocabulary = vocabulary
        options: dict[str, Any] = {"dtype": params_dtype, "device": device}
        self.key_proj = Projection(config.summed_dim, hidden_size, **options)
        self.value_proj = Projection(config.summed_dim, hidden_size, **options)
        self.query_norm = nn.Parameter(torch.empty(hidden_size, **options))
        self.key_norm = nn.Parameter(torch.empty(hidden_size, **options))
        self.conv_norm: Optional[nn.Parameter] = None
        self.conv: Optional[nn.Parameter] = None
        if config.conv_kernel:
            self.conv_norm = nn.Parameter(torch.empty(hidden_size, **options))
            self.conv = nn.Parameter(torch.empty(hidden_size, config.conv_kernel, **options))
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.register_buffer("multipliers", torch.empty(config.ngram_size, dtype=torch.int64, device=device))
        self.register_buffer("canonical", torch.empty(vocabulary, dtype=torch.int32, device=device))
        name = f"{config.family} layer {layer_index}"
        self.take_table(table, lambda: ValueTable(config, self.window.rows, params_dtype, device, shard, name))
        if not self.canonical.is_meta:
            self.multipliers.copy_(draw_multipliers(config, vocabulary, layer_index))
            self.canonical.copy_(torch.arange(vocabulary))
            if perform_initialization:
                initialize_engram(self, ffn_hidden_size, num_layers, ffn_gated, ffn_activation)

    @torch.no_grad()
    def set_canonical(self, ids: Tensor) -> None:
        """Take ``ids`` [vocabulary], each below ``vocabulary``, for the canonical ids."""
        self.canonical.copy_(ids)

    def forward(self, x: Tensor, contexts: Tensor) -> Tensor:
        """``x`` [s, b, H], the normalised FFN input, and contexts [s, b] (``ngrams.contexts``, turned), to [s, b, H],
        to be added to the FFN's output. For whole sequences on one rank."""
        return self.convolve(self.finish(self.start(x, contexts)), contexts)

    def start(self, x: Tensor, contexts: Tensor) -> Started:
        """Start to fetch the rows of the tokens with ``x`` [..., H] and contexts [...]."""
        flat = x.reshape(-1, self.hidden_size)
        packed = contexts.reshape(-1)
        rows = addresses(packed, self.config, self.vocabulary, self.canonical, self.multipliers)
        if self.row_counts is not None:
            self.row_counts.index_add_(0, rows.flatten(), torch.ones_like(rows.flatten()))
        heads = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        ones = torch.ones(*rows.shape, 1, dtype=at_least_float32(flat[:0]).dtype, device=rows.device)
        return Started(x, rows, self.table.start(rows, heads, ones, self.table.gather(flat, None)))

    def finish(self, started: Started) -> Tensor:
        """The gated values u [..., H] of the tokens of ``start``, before the convolution."""
        joined = self.table(started.lookup).to(self.value_proj.weight.dtype)
        query = self._normalised(started.x.reshape(-1, self.hidden_size), self.query_norm)
        key = self._normalised(self.key_proj(joined), self.key_norm)
        gate = (query * key).sum(-1, keepdim=True) / math.sqrt(self.hidden_size)
        alpha = torch.sigmoid(gate.abs().clamp(min=LEAST_ROOT).sqrt() * gate.sign())
        value = self.value_proj(joined)
        output = (alpha * value).to(value.dtype)
        if self.training and torch.is_grad_enabled() and self.statistics is not None:
            ones = torch.ones_like(started.rows, dtype=torch.float32).unsqueeze(-1)
            self.statistics.record(started.rows, ones * alpha.detach().float().unsqueeze(-1), output)
            self.statistics.served_picks += getattr(started.lookup, "received", 0)
        return output.view(started.x.shape)

    def convolve(self, gated: Tensor, contexts: Tensor, before: int = 0) -> Tensor:
        """Gated values u [s, b, H] with what the convolution adds, but for the first ``before`` tokens, which are only
        looked at; contexts [s - before, b] are of the others."""
        if self.conv is None or self.conv_norm is None:
            return gated[before:]
        normed = self._normalised(gated, self.conv_norm).to(gated.dtype)
        reach = reach_of(contexts, self.config, self.vocabulary)
        length, taps = gated.shape[0], self.config.conv_kernel
        total = torch.zeros((), dtype=gated.dtype, device=gated.device)
        for tap in range(taps):
            back = (taps - 1 - tap) * self.config.ngram_size
            weight = self.conv[:, tap]
            if back >= length:
                total = total + 0.0 * weight.sum()  # ranks and steps have the same parameters in their graphs
                continue
            seen = normed[max(before - back, 0) : length - back]
            missing = length - before - seen.shape[0]
            if missing:
                seen = torch.cat([seen.new_zeros(missing, *seen.shape[1:]), seen])
            total = total + torch.where((reach >= back).unsqueeze(-1), seen, 0) * weight
        return gated[before:] + functional.silu(total)

    def _normalised(self, x: Tensor, gain: Tensor) -> Tensor:
        exact = at_least_float32(x)
        scaled = exact * (exact.square().mean(-1, keepdim=True) + self.config.norm_epsilon).rsqrt()
        return scaled * at_least_float32(gain)
