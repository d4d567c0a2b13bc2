"""The lookup in a table whose rows are shared out: every rank holds a range of whole rows and serves its picks.

Each pick goes to the rank that holds its row, so a rank's work follows what is picked; rows are shuffled, so that
neighbours in the grid of keys lie on different ranks. A rank may get all picks or none. Letters: T tokens of one rank,
P picks of a token, C cores, E virtual blocks, n picks that a rank receives. Exchanges, each named by its step:

    start      pick_counts    all-to-all      [M, T] picks of each token for each rank
               projected      all-gather      [T, Dp]                -> [M*T, Dp]
    send       rows, scores   all-to-all      the picks, in order of owner, then token -> [n], [n, C]
    finish     output         reduce-scatter  [M*T, E * Dv] parts    -> [T, E * Dv]
    backward   output_grad    all-gather      [T, E * Dv]            -> [M*T, E * Dv]
    of finish  score_grads    all-to-all      [n, C]                 -> the picks as they were sent
               projected_grad reduce-scatter  [M*T, Dp] parts        -> [T, Dp]
               the last two are waited for in the backward of start

Nothing of the size M*T*P is moved, which is why this mode sends less than ``dim_sharded.py`` when P is large. Which
token a pick belongs to follows from the counts and is not sent. The sizes of the parts must be known on the host, which
waits for them in every forward, as in any dropless mixture of experts.

**When the host waits.** On a GPU ``send`` is the beginning of ``finish``, after the FFN beside the memory layer has
been launched: the device computes it while the host waits and picks travel. For that, counts are exchanged on the side
stream of ``parallel/streams.py``, also without --memory-stream: the host waits for the counts and not for the FFN
behind them, and what ``send`` starts follows what ``start`` made, not the FFN. On a CPU the host is the device, so
``send`` is the end of ``start``, and exchanges run beside the FFN. The numbers are the same. A backward knows the sizes
and waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import TableShard
from umv2_megatron.memory.picked_cells import decode, encode
from umv2_megatron.ops import get_backend
from umv2_megatron.ops.interface import ListedPicks, RaggedParts, activate, activation_backward
from umv2_megatron.ops.main_grad import gradient_sum, hand_over
from umv2_megatron.parallel import streams
from umv2_megatron.parallel.exchange import Exchange, Pending


@dataclass
class _Call:
    """One use of the table, from its start to the end of its backward."""

    exchange: Exchange
    parts: RaggedParts
    num_blocks: int
    activation: str
    aside: streams.Branch
    """Where sizes and picks are exchanged."""
    order: Tensor
    """[T * P] int64: the picks in the order in which they are sent."""
    counts: Tensor
    """[M * T] int64: picks received for each token of each rank."""
    send: list[int] = field(default_factory=list)
    receive: list[int] = field(default_factory=list)
    cells: Optional[Pending] = None
    scores: Optional[Pending] = None
    projected: Optional[Pending] = None
    score_grads: Optional[Pending] = None
    projected_grad: Optional[Pending] = None


@dataclass
class Started:
    """What ``finish`` needs; the exchanges of ``start`` are under way."""

    call: _Call
    ordered: Tensor
    """[T * P, C]: the scores in the order in which they are sent."""
    projected: Optional[Tensor]
    cells: Tensor
    """[T * P] integers: the picks of this rank's tokens, in this order."""
    sizes: Tensor
    """[2, M] int64: picks sent to each rank, and received."""

    @property
    def received(self) -> int:
        """Picks that this rank serves; known once they have been sent."""
        return sum(self.call.receive)


class RowShardedLookup:
    """The lookup over ``exchange`` in tables of ``rows`` rows of which this rank holds a range."""

    def __init__(self, config: MemoryConfig, rows: int, shard: TableShard, exchange: Exchange) -> None:
        self.config, self.exchange = config, exchange
        ranges = [TableShard(shard.mode, shard.size, rank).rows(rows) for rank in range(shard.size)]
        self._starts = torch.tensor([start for start, _ in ranges], device="cpu")
        self._largest = max(stop - start for start, stop in ranges)

    def start(self, rows: Tensor, blocks: Optional[Tensor], scores: Tensor, projected: Optional[Tensor]) -> Started:
        """Send every pick to its owner; arguments as in ``ops.interface.TableLookup``."""
        config, exchange, tokens = self.config, self.exchange, rows.shape[0]
        self._starts = self._starts.to(rows.device)  # moved once
        owners = torch.bucketize(rows, self._starts, right=True) - 1
        token = torch.arange(tokens, device=rows.device).unsqueeze(1)
        # not bincount, for which the host would wait once more
        counts = torch.zeros(exchange.size * tokens, dtype=torch.int64, device=rows.device)
        places = (owners * tokens + token).flatten()
        counts = counts.scatter_add_(0, places, torch.ones_like(places)).view(exchange.size, tokens)
        aside = streams.branch_for(rows.device, wanted=True)
        own, sent = counts.sum(1), counts.int()
        aside.follow(own, sent)
        with aside.beside():
            arriving = exchange.all_to_all("pick_counts", sent).wait().long()
            sizes = torch.stack([own, arriving.sum(1)])
        # Picks lie in the order of tokens, which a stable sort keeps within an owner.
        order = owners.flatten().sort(stable=True).indices
        cells = encode(rows - self._starts[owners], blocks, config.num_blocks, self._largest).flatten()[order]
        parts = get_backend(config.backend, rows.device, config.backward).ragged
        assert parts is not None, config.backend
        call = _Call(
            exchange,
            parts,
            config.num_blocks,
            config.pre_value_activation,
            aside,
            order,
            aside.lend(arriving).flatten(),
        )
        ordered, everyones = _Order.apply(scores, projected, call)
        started = Started(call, ordered, everyones, cells, sizes)
        aside.follow(cells, ordered)
        if not sends_late(rows.device):
            _send(started)
        return started

    def finish(self, started: Started, pre_values: Optional[Tensor], values: Tensor) -> Tensor:
        """The summed rows of this rank's tokens, [T, E * Dv]."""
        if started.call.cells is None:
            _send(started)
        return _Finish.apply(started.ordered, started.projected, pre_values, values, started.call)


def sends_late(device: torch.device) -> bool:
    """Whether picks are sent once the FFN has been launched (see the top)."""
    return device.type != "cpu"


def _send(started: Started) -> None:
    """Wait for the sizes, and start to send the picks."""
    call = started.call
    with call.aside.beside():
        call.send, call.receive = started.sizes.tolist()
        exchange = call.exchange
        call.cells = exchange.all_to_all_ragged("rows", started.cells, call.send, call.receive)
        call.scores = exchange.all_to_all_ragged("scores", started.ordered.detach(), call.send, call.receive)
    for each in (call.cells, call.scores):
        call.aside.lend(each.output)


class _Order(torch.autograd.Function):
    """Scores [T, P, C] in the order in which they are sent, [T * P, C]; projected inputs [T, Dp] to [M * T, Dp], still
    on their way."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, projected: Optional[Tensor], call: _Call
    ) -> tuple[Tensor, Optional[Tensor]]:
        ctx.call, ctx.shape = call, scores.shape
        ordered = scores.flatten(0, 1)[call.order]
        if projected is None:
            return ordered, None
        call.projected = call.exchange.all_gather("projected", projected)
        return ordered, call.projected.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        # ``grads`` are what _Finish has already sent on its way; here they arrive.
        call = ctx.call
        assert call.score_grads is not None
        arrived = call.score_grads.wait()
        score_grad = torch.empty_like(arrived)
        score_grad[call.order] = arrived
        projected_grad = call.projected_grad.wait() if call.projected_grad is not None else None
        return score_grad.view(ctx.shape), projected_grad, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ordered: Tensor, projected: Optional[Tensor], pre_values: Optional[Tensor], values: Tensor,
        call: _Call,
    ) -> Tensor:  # fmt: skip
        assert call.cells is not None and call.scores is not None
        cells, scores = call.cells.wait(), call.scores.wait()
        picks = _picks(call, cells)
        rho: Optional[Tensor] = None
        weights = scores
        if pre_values is not None and projected is not None and call.projected is not None:
            call.projected.wait()
            rho = call.parts.pre_scores(picks, projected, pre_values, scores.dtype)
            weights = scores * activate(rho, call.activation).unsqueeze(-1)
        parts = call.parts.weighted_sum(picks, weights, values)
        ctx.save_for_backward(scores, projected, rho, cells)
        # The tables are attributes: they are parameters, and their main_grad must be found again.
        ctx.pre_values, ctx.values, ctx.call = pre_values, values, call
        return call.exchange.reduce_scatter("output", parts).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        scores, projected, rho, cells = ctx.saved_tensors
        pre_values, values, call = ctx.pre_values, ctx.values, ctx.call
        needs, exchange = ctx.needs_input_grad, call.exchange
        arriving = exchange.all_gather("output_grad", grads[0])
        picks = _picks(call, cells)
        active = activate(rho, call.activation).unsqueeze(-1) if rho is not None else None
        weights = scores * active if active is not None else scores
        value_sum = gradient_sum(values) if needs[3] else None
        grad_out = arriving.wait().view(call.counts.shape[0], call.num_blocks, -1)
        weight_grad = call.parts.weighted_sum_backward(picks, weights, grad_out, values, value_sum)
        score_grad = weight_grad * active if active is not None else weight_grad
        call.score_grads = exchange.all_to_all_ragged("score_grads", score_grad, call.receive, call.send)
        all_projected_grad, pre_value_sum = None, None
        if rho is not None:
            rho_grad = activation_backward((weight_grad * scores).sum(-1), rho, call.activation)
            pre_value_sum = gradient_sum(pre_values) if needs[2] else None
            all_projected_grad = call.parts.pre_scores_backward(picks, rho_grad, projected, pre_values, pre_value_sum)
            call.projected_grad = exchange.reduce_scatter("projected_grad", all_projected_grad)
        # Gradients on their way, of the shapes that autograd expects; _Order's backward waits for them.
        sent = (call.score_grads.output, all_projected_grad)
        return (*sent, hand_over(pre_values, pre_value_sum), hand_over(values, value_sum), None)


def _picks(call: _Call, cells: Tensor) -> ListedPicks:
    """The picks received, [n], of the tokens of all ranks."""
    rows, blocks = decode(cells, call.num_blocks)
    every = torch.arange(call.counts.shape[0], device=call.counts.device)
    tokens = every.repeat_interleave(call.counts, output_size=rows.shape[0])
    return ListedPicks(rows, tokens, call.counts, blocks, call.num_blocks)
