"""The lookup in a table whose columns are shared out: every rank holds Dp/M and Dv/M columns of every row.

Every rank works on the picks of all ranks, with its own columns, so the load is even whatever is picked. Letters: T
tokens of one rank, P picks of a token, C cores, C' of them (counted as in ``TableShard.cores``) that touch one rank's
columns, E virtual blocks. Exchanges, each named by its step, with what one rank has before and after:

    gather     projected      all-to-all      [T, Dp]                      -> [M*T, Dp/M], before the search for picks
    start      rows           all-gather      [T, P] cells                 -> [M*T, P]
    finish     pre_scores     reduce-scatter  [M*T, P] parts of rho        -> [T, P]
               weights        all-to-all      [T, P, C] score * rho        -> [M*T, P, C']
               output         all-to-all      [M*T, E * Dv/M]              -> [T, E * Dv]
    backward   output_grad    all-to-all      [T, E * Dv]                  -> [M*T, E * Dv/M]
    of finish  weight_grads   all-to-all      [M*T, P, C'] parts           -> [T, P, C], summed here
               rho_grads      all-gather      [T, P]                       -> [M*T, P]
               projected_grad all-to-all      [M*T, Dp/M]                  -> [T, Dp], awaited by the backward of gather

The paper gathers the scores and sums the pre-scores on every rank; summing them at the token's own rank, which then
sends finished weights to the ranks whose columns need them, moves about half as many bytes (docs/memory-parallel.md).
Every table gradient is a sum over the tokens of all M ranks, so nothing has to be reduced over this group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import TableShard
from umv2_megatron.memory.picked_cells import decode, encode
from umv2_megatron.ops import get_backend
from umv2_megatron.ops.interface import GridParts, PickOrder, activate, activation_backward
from umv2_megatron.ops.main_grad import gradient_sum, hand_over
from umv2_megatron.parallel.exchange import Exchange, Pending


@dataclass
class _Call:
    """One use of the table, from its start to the end of its backward."""

    exchange: Exchange
    parts: GridParts
    cores: Tensor
    """[M, C'] int64: the core of each slice of each rank's columns."""
    num_blocks: int
    activation: str
    cells: Optional[Pending] = None
    projected: Optional[Pending] = None
    projected_grad: Optional[Pending] = None


@dataclass
class Gathered:
    """Projected inputs on their way, for ``start``: [M * T, Dp/M], None without pre-values."""

    call: _Call
    slices: Optional[Tensor]


@dataclass
class Started:
    """What ``finish`` needs; the exchanges of ``start`` are under way."""

    call: _Call
    scores: Tensor
    slices: Optional[Tensor]


class DimShardedLookup:
    """The lookup over ``exchange`` in tables of ``rows`` rows of which this rank holds some columns."""

    def __init__(self, config: MemoryConfig, rows: int, shard: TableShard, exchange: Exchange) -> None:
        self.config, self.rows, self.exchange = config, rows, exchange
        ranks = [TableShard(shard.mode, shard.size, rank) for rank in range(shard.size)]
        self._cores = torch.tensor([each.cores(config.value_dim, config.num_cores) for each in ranks], device="cpu")

    def gather(self, x: Tensor, projected: Optional[Tensor]) -> Gathered:
        """Send the columns of the projected inputs [T, Dp] of the tokens ``x`` [T, ...] off, if there are any."""
        config = self.config
        self._cores = self._cores.to(x.device)  # moved once
        parts = get_backend(config.backend, x.device, config.backward).grid
        assert parts is not None, config.backend
        call = _Call(self.exchange, parts, self._cores, config.num_blocks, config.pre_value_activation)
        return Gathered(call, _SendProjected.apply(projected, call) if projected is not None else None)

    def start(self, rows: Tensor, blocks: Optional[Tensor], scores: Tensor, gathered: Gathered) -> Started:
        """Send picks off; arguments as in ``ops.interface.TableLookup``, but for what ``gather`` made of the projected
        inputs."""
        call = gathered.call
        call.cells = self.exchange.all_gather("rows", encode(rows, blocks, self.config.num_blocks, self.rows))
        return Started(call, scores, gathered.slices)

    def finish(self, started: Started, pre_values: Optional[Tensor], values: Tensor) -> Tensor:
        """The summed rows of this rank's tokens, [T, E * Dv]."""
        return _Finish.apply(started.scores, started.slices, pre_values, values, started.call)


class _SendProjected(torch.autograd.Function):
    """[T, Dp] to [M * T, Dp/M], still on its way."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        call.projected = call.exchange.all_to_all("projected", _columns_first(projected, call.exchange.size))
        return call.projected.output.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        # ``grads`` is what _Finish has already sent on its way; here it arrives.
        pending = ctx.call.projected_grad
        return _columns_together(pending.wait()) if pending is not None else None, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, slices: Optional[Tensor], pre_values: Optional[Tensor], values: Tensor, call: _Call
    ) -> Tensor:
        exchange, size = call.exchange, call.exchange.size
        tokens, picks, _ = scores.shape
        assert call.cells is not None
        cells = call.cells.wait()
        rows, blocks = decode(cells, call.num_blocks)
        rho: Optional[Tensor] = None
        weights = scores
        if pre_values is not None and slices is not None and call.projected is not None:
            call.projected.wait()
            parts = call.parts.pre_scores(rows, slices, pre_values, scores.dtype)
            rho = exchange.reduce_scatter("pre_scores", parts).wait()
            weights = scores * activate(rho, call.activation).unsqueeze(-1)
        # [T, P, M, C'] of the weights that each rank's columns need, rank first
        needed = weights[..., call.cores].permute(2, 0, 1, 3)
        weights = exchange.all_to_all("weights", needed).wait().flatten(0, 1)
        out = call.parts.weighted_sum(rows, blocks, weights, values, call.num_blocks)
        out = exchange.all_to_all("output", out.view(size, tokens, -1)).wait()
        ctx.save_for_backward(scores, slices, rho, cells, weights)
        # The tables are attributes: they are parameters, and their main_grad must be found again.
        ctx.pre_values, ctx.values, ctx.call = pre_values, values, call
        out = out.view(size, tokens, call.num_blocks, -1)
        return out.permute(1, 2, 0, 3).reshape(tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        scores, slices, rho, cells, weights = ctx.saved_tensors
        pre_values, values, call = ctx.pre_values, ctx.values, ctx.call
        needs, exchange = ctx.needs_input_grad, call.exchange
        size, tokens = exchange.size, scores.shape[0]
        grad_out = grads[0].view(tokens, call.num_blocks, size, -1).permute(2, 0, 1, 3)
        grad_out = exchange.all_to_all("output_grad", grad_out).wait().flatten(0, 1)
        rows, blocks = decode(cells, call.num_blocks)
        value_sum = gradient_sum(values) if needs[3] else None
        order = PickOrder()
        parts = call.parts.weighted_sum_backward(rows, blocks, weights, grad_out, values, value_sum, order)
        if not needs[0] and rho is None:  # scores that are ones for all
            return None, None, None, hand_over(values, value_sum), None
        arrived = exchange.all_to_all("weight_grads", parts.view(size, *scores.shape[:2], -1)).wait()
        weight_grad = torch.zeros_like(scores)
        weight_grad.index_add_(2, call.cores.flatten(), arrived.permute(1, 2, 0, 3).flatten(2))
        score_grad, slices_grad, pre_value_sum = weight_grad, None, None
        if rho is not None:
            score_grad = weight_grad * activate(rho, call.activation).unsqueeze(-1)
            rho_grad = activation_backward((weight_grad * scores).sum(-1), rho, call.activation)
            rho_grad = exchange.all_gather("rho_grads", rho_grad).wait()
            pre_value_sum = gradient_sum(pre_values) if needs[2] else None
            slices_grad = call.parts.pre_scores_backward(rows, rho_grad, slices, pre_values, pre_value_sum, order)
            call.projected_grad = exchange.all_to_all("projected_grad", slices_grad.view(size, tokens, -1))
        return score_grad, slices_grad, hand_over(pre_values, pre_value_sum), hand_over(values, value_sum), None


def _columns_first(tensor: Tensor, size: int) -> Tensor:
    """[T, D] to [M, T, D/M]: part m has the columns of rank m."""
    return tensor.view(tensor.shape[0], size, -1).transpose(0, 1)


def _columns_together(parts: Tensor) -> Tensor:
    """[M, T, D/M] to [T, D]."""
    return parts.transpose(0, 1).flatten(1)
