"""The lookup in a table whose rows are shared out: every rank holds a range of whole rows and serves its picks.

Each pick goes to the rank that holds its row, so a rank's work follows what is picked; rows are shuffled, so that
neighbours in the grid of keys lie on different ranks. A rank may get all picks or none. Letters: T tokens of one rank,
P picks of a token, C cores, E virtual blocks, n picks that a rank receives. Exchanges, each named by its step:

    gather     projected      all-gather      [T, Dp]                -> [M*T, Dp], before the search for picks
    start      pick_counts    all-to-all      [M, T] picks of each token for each rank
    send       rows, scores   all-to-all      the picks, in order of owner, then token -> [n], [n, C]
    finish     output         reduce-scatter  [M*T, E * Dv] parts    -> [T, E * Dv]
    backward   output_grad    all-gather      [T, E * Dv]            -> [M*T, E * Dv]
    of finish  score_grads    all-to-all      [n, C]                 -> the picks as they were sent
               projected_grad reduce-scatter  [M*T, Dp] parts        -> [T, Dp]
               the last two are waited for in the backward of start and of gather

Nothing of the size M*T*P is moved, which is why this mode sends less than ``dim_sharded.py`` when P is large. Which
token a pick belongs to follows from the counts and is not sent. The sizes of the parts must be known on the host, which
waits for them in every forward, as in any dropless mixture of experts.

**Parts.** With --memory-exchange-parts n the tokens of a rank are cut into n spans, each a lookup with exchanges of its
own (but for the counts): sums of a span travel while the rows of the next one are added up, and in the backward a
span's gradients are used while those of the next one arrive. Between nodes the sums are most of what is sent. What a
span adds to the tables' gradients is added to what those before it have; nothing else depends on n.

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
    """One use of the table by a span of tokens, from its start to the end of its backward."""

    exchange: Exchange
    parts: RaggedParts
    num_blocks: int
    activation: str
    aside: streams.Branch
    """Where sizes and picks are exchanged."""
    order: Optional[Tensor] = None
    """[T * P] int64: the picks in the order in which they are sent."""
    counts: Optional[Tensor] = None
    """[M * T] int64: picks received for each token of each rank."""
    send: list[int] = field(default_factory=list)
    receive: list[int] = field(default_factory=list)
    cells: Optional[Pending] = None
    scores: Optional[Pending] = None
    projected: Optional[Pending] = None
    output: Optional[Pending] = None
    output_grad: Optional[Pending] = None
    score_grads: Optional[Pending] = None
    projected_grad: Optional[Pending] = None


@dataclass
class Gathered:
    """Projected inputs of all ranks on their way, for ``start``: one piece, [M * T, Dp], for each call; None without
    pre-values."""

    calls: list[_Call]
    pieces: list[Optional[Tensor]]


@dataclass
class _Span:
    """What ``finish`` needs of a span."""

    call: _Call
    ordered: Tensor
    """[T * P, C]: the scores in the order in which they are sent."""
    projected: Optional[Tensor]
    cells: Tensor
    """[T * P] integers: the picks of this rank's tokens, in this order."""


@dataclass
class Started:
    """What ``finish`` needs; the exchanges of ``start`` are under way."""

    spans: list[_Span]
    sizes: Tensor
    """[2, spans, M] int64: picks sent to each rank, and received."""

    @property
    def received(self) -> int:
        """Picks that this rank serves; known once they have been sent."""
        return sum(sum(each.call.receive) for each in self.spans)


class RowShardedLookup:
    """The lookup over ``exchange`` in tables of ``rows`` rows of which this rank holds a range."""

    def __init__(self, config: MemoryConfig, rows: int, shard: TableShard, exchange: Exchange) -> None:
        self.config, self.exchange = config, exchange
        ranges = [TableShard(shard.mode, shard.size, rank).rows(rows) for rank in range(shard.size)]
        self._starts = torch.tensor([start for start, _ in ranges], device="cpu")
        self._largest = max(stop - start for start, stop in ranges)

    def gather(self, x: Tensor, projected: Optional[Tensor]) -> Gathered:
        """Start to gather the projected inputs [T, Dp] of the tokens ``x`` [T, ...], if there are any."""
        config = self.config
        parts = get_backend(config.backend, x.device, config.backward).ragged
        assert parts is not None, config.backend
        lengths = _lengths(x.shape[0], config.exchange_parts)
        aside = streams.branch_for(x.device, wanted=True)
        calls = [_Call(self.exchange, parts, config.num_blocks, config.pre_value_activation, aside) for _ in lengths]
        if projected is None:
            return Gathered(calls, [None] * len(calls))
        pieces = projected.split(lengths)
        return Gathered(calls, [_Gather.apply(piece, call) for piece, call in zip(pieces, calls)])

    def start(self, rows: Tensor, blocks: Optional[Tensor], scores: Tensor, gathered: Gathered) -> Started:
        """Send every pick to its owner; arguments as in ``ops.interface.TableLookup``, but for what ``gather`` made of
        the projected inputs."""
        config, exchange, tokens = self.config, self.exchange, rows.shape[0]
        self._starts = self._starts.to(rows.device)  # moved once
        owners = torch.bucketize(rows, self._starts, right=True) - 1
        token = torch.arange(tokens, device=rows.device).unsqueeze(1)
        # not bincount, for which the host would wait once more
        counts = torch.zeros(exchange.size * tokens, dtype=torch.int64, device=rows.device)
        places = (owners * tokens + token).flatten()
        counts = counts.scatter_add_(0, places, torch.ones_like(places)).view(exchange.size, tokens)
        lengths = _lengths(tokens, config.exchange_parts)
        aside = gathered.calls[0].aside
        own, sent = _sums(counts, lengths), counts.int()
        aside.follow(own, sent)
        with aside.beside():
            arriving = exchange.all_to_all("pick_counts", sent).wait().long()
            sizes = torch.stack([own, _sums(arriving, lengths)])
        arrived = aside.lend(arriving).split(lengths, dim=1)
        cells = encode(rows - self._starts[owners], blocks, config.num_blocks, self._largest)
        spans = []
        pieces = zip(owners.split(lengths), cells.split(lengths), scores.split(lengths))
        for number, (owner, cell, score) in enumerate(pieces):
            call = gathered.calls[number]
            # Picks lie in the order of tokens, which a stable sort keeps within an owner.
            call.order = owner.flatten().sort(stable=True).indices
            call.counts = arrived[number].flatten()
            ordered = _Order.apply(score, call)
            spans.append(_Span(call, ordered, gathered.pieces[number], cell.flatten()[call.order]))
        aside.follow(*(tensor for span in spans for tensor in (span.cells, span.ordered)))
        started = Started(spans, sizes)
        if not sends_late(rows.device):
            _send(started)
        return started

    def finish(self, started: Started, pre_values: Optional[Tensor], values: Tensor) -> Tensor:
        """The summed rows of this rank's tokens, [T, E * Dv]."""
        if started.spans[0].call.cells is None:
            _send(started)
        sums = [_Finish.apply(span.ordered, span.projected, pre_values, values, span.call) for span in started.spans]
        return _Arrive.apply([span.call for span in started.spans], *sums)


def _lengths(tokens: int, parts: int) -> list[int]:
    """Of the spans: equal but for the last; fewer than ``parts`` where there are fewer tokens."""
    length = max(1, -(-tokens // parts))
    return [min(length, tokens - start) for start in range(0, tokens, length)] or [0]


def _sums(counts: Tensor, lengths: list[int]) -> Tensor:
    """[spans, M] of ``counts`` [M, T]."""
    return torch.stack([each.sum(1) for each in counts.split(lengths, dim=1)])


def sends_late(device: torch.device) -> bool:
    """Whether picks are sent once the FFN has been launched (see the top)."""
    return device.type != "cpu"


def _send(started: Started) -> None:
    """Wait for the sizes, and start to send the picks."""
    aside = started.spans[0].call.aside
    with aside.beside():
        send, receive = started.sizes.tolist()
        for number, span in enumerate(started.spans):
            call, exchange = span.call, span.call.exchange
            call.send, call.receive = send[number], receive[number]
            call.cells = exchange.all_to_all_ragged("rows", span.cells, call.send, call.receive)
            call.scores = exchange.all_to_all_ragged("scores", span.ordered.detach(), call.send, call.receive)
    for span in started.spans:
        assert span.call.cells is not None and span.call.scores is not None
        for each in (span.call.cells, span.call.scores):
            aside.lend(each.output)


class _Gather(torch.autograd.Function):
    """[T, Dp] to [M * T, Dp], still on their way."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        call.projected = call.exchange.all_gather("projected", projected)
        return call.projected.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], None]:
        # ``grads`` is what _Finish has already sent on its way; here it arrives.
        pending = ctx.call.projected_grad
        return pending.wait() if pending is not None else None, None


class _Order(torch.autograd.Function):
    """Scores [T, P, C] in the order in which they are sent, [T * P, C]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, call: _Call) -> Tensor:
        ctx.call, ctx.shape = call, scores.shape
        return scores.flatten(0, 1)[call.order]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # ``grads`` are on their way, as in _Gather.
        call = ctx.call
        assert call.score_grads is not None
        arrived = call.score_grads.wait()
        score_grad = torch.empty_like(arrived)
        score_grad[call.order] = arrived
        return score_grad.view(ctx.shape), None


class _Finish(torch.autograd.Function):
    """The sums of a span, [T, E * Dv], still on their way."""

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
        call.output = call.exchange.reduce_scatter("output", parts)
        return call.output.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        scores, projected, rho, cells = ctx.saved_tensors
        pre_values, values, call = ctx.pre_values, ctx.values, ctx.call
        needs, exchange = ctx.needs_input_grad, call.exchange
        picks = _picks(call, cells)
        active = activate(rho, call.activation).unsqueeze(-1) if rho is not None else None
        weights = scores * active if active is not None else scores
        value_sum = gradient_sum(values) if needs[3] else None
        # ``grads`` is this rank's; those of all ranks are on their way since the backward of _Arrive.
        grad_out = call.output_grad.wait().view(call.counts.shape[0], call.num_blocks, -1)
        weight_grad = call.parts.weighted_sum_backward(picks, weights, grad_out, values, value_sum)
        score_grad = weight_grad * active if active is not None else weight_grad
        if needs[0]:  # scores that are ones for all have no gradients, and nobody would wait for them
            call.score_grads = exchange.all_to_all_ragged("score_grads", score_grad, call.receive, call.send)
        all_projected_grad, pre_value_sum = None, None
        if rho is not None:
            rho_grad = activation_backward((weight_grad * scores).sum(-1), rho, call.activation)
            pre_value_sum = gradient_sum(pre_values) if needs[2] else None
            all_projected_grad = call.parts.pre_scores_backward(picks, rho_grad, projected, pre_values, pre_value_sum)
            call.projected_grad = exchange.reduce_scatter("projected_grad", all_projected_grad)
        # Gradients on their way, of the shapes that autograd expects; backwards of _Order and _Gather wait for them.
        sent = (call.score_grads.output if call.score_grads is not None else None, all_projected_grad)
        return (*sent, hand_over(pre_values, pre_value_sum), hand_over(values, value_sum), None)


class _Arrive(torch.autograd.Function):
    """The sums of all spans together, [T, E * Dv], arrived."""

    @staticmethod
    def forward(ctx: Any, calls: list[_Call], *sums: Tensor) -> Tensor:
        ctx.calls, ctx.lengths = calls, [each.shape[0] for each in sums]
        arrived = [_waited(call.output) for call in calls]
        return torch.cat(arrived) if len(arrived) > 1 else arrived[0].view_as(arrived[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        pieces = grads[0].split(ctx.lengths)
        # Autograd comes to the last span first.
        for call, piece in reversed(list(zip(ctx.calls, pieces))):
            call.output_grad = call.exchange.all_gather("output_grad", piece)
        return (None, *pieces)


def _waited(pending: Optional[Pending]) -> Tensor:
    assert pending is not None
    return pending.wait()


def _picks(call: _Call, cells: Tensor) -> ListedPicks:
    """The picks received, [n], of the tokens of all ranks."""
    rows, blocks = decode(cells, call.num_blocks)
    assert call.counts is not None
    every = torch.arange(call.counts.shape[0], device=call.counts.device)
    tokens = every.repeat_interleave(call.counts, output_size=rows.shape[0])
    return ListedPicks(rows, tokens, call.counts, blocks, call.num_blocks)
