"""The collectives that move picks, projected inputs and partial sums between the ranks of a memory-parallel group.

Each is started at once and finished later: ``Pending.wait`` gives the result. Between the two the caller computes
something else (the dense FFN of the same block). NCCL runs collectives on a stream of its own and ``wait`` makes the
current stream wait for it; gloo runs them on threads.

Every exchange counts, by the name of its step, the bytes that this rank sends to other ranks, as the best algorithm
for its kind would (all-gather and reduce-scatter of n bytes per rank: (M-1) n); ``planning/exchange.py`` predicts the
same numbers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Optional

import torch
from torch import Tensor, distributed

from umv2_megatron.parallel.roll_call import watched

# torch 2.13 renamed them and warns of the old names at every call; older torch has only those.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class Pending:
    """A collective that has been started; keeps its input alive until ``wait``, and its result no longer."""

    def __init__(self, exchange: Exchange, step: str, output: Tensor, source: Tensor, work: Any) -> None:
        self._output: Optional[Tensor] = output
        self._exchange, self._step, self._source, self._work = exchange, step, source, work

    @property
    def output(self) -> Tensor:
        """Where the result arrives; not to be read before ``wait``, and gone after it."""
        assert self._output is not None, "waited for before"
        return self._output

    def wait(self) -> Tensor:
        """The result; to be called once. Raises ``ExchangeError`` naming the group, the step and who is missing."""
        output = self.output
        with self._exchange.watched(self._step):
            self._work.wait()
        # An autograd function may return ``output``; then its grad_fn leads here, and a reference back to it would be a
        # circle that Python's garbage collector cannot see through.
        self._work, self._source, self._output = None, None, None
        return output


class Exchange:
    """Collectives of one memory layer over its memory-parallel group.

    Args:
        group: the M ranks.
        name: of the layer, for error messages.
    """

    def __init__(self, group: distributed.ProcessGroup, name: str) -> None:
        self.group = group
        self.name = name
        self.size: int = group.size()
        self.rank: int = group.rank()
        self.sent: Counter[str] = Counter()
        """Bytes sent to other ranks since creation, by step."""

    def watched(self, step: str) -> Any:
        """Context in which a failing collective becomes an ``ExchangeError``."""
        return watched(self.group, "memory-parallel group", f"{step} of {self.name}")

    def all_gather(self, step: str, tensor: Tensor) -> Pending:
        """[n, ...] of every rank to [M * n, ...], in the order of ranks."""
        source = tensor.contiguous()
        output = source.new_empty((self.size * source.shape[0], *source.shape[1:]))
        self._count(step, (self.size - 1) * _bytes(source))
        with self.watched(step):
            work = _all_gather(output, source, group=self.group, async_op=True)
        return Pending(self, step, output, source, work)

    def reduce_scatter(self, step: str, tensor: Tensor) -> Pending:
        """[M * n, ...] of every rank to the sum over ranks of this rank's [n, ...]."""
        source = tensor.contiguous()
        output = source.new_empty((source.shape[0] // self.size, *source.shape[1:]))
        self._count(step, (self.size - 1) * _bytes(output))
        with self.watched(step):
            work = _reduce_scatter(output, source, group=self.group, async_op=True)
        return Pending(self, step, output, source, work)

    def all_to_all(self, step: str, tensor: Tensor) -> Pending:
        """[M, ...]: part m goes to rank m; the result's part m came from rank m."""
        source = tensor.contiguous()
        assert source.shape[0] == self.size, source.shape
        output = torch.empty_like(source)
        self._count(step, _bytes(source) // self.size * (self.size - 1))
        with self.watched(step):
            work = distributed.all_to_all_single(output, source, group=self.group, async_op=True)
        return Pending(self, step, output, source, work)

    def all_to_all_ragged(self, step: str, tensor: Tensor, send: list[int], receive: list[int]) -> Pending:
        """[n, ...], of which ``send[m]`` entries in a row go to rank m; ``receive[m]`` entries come from rank m.

        Any of these numbers may be 0.
        """
        source = tensor.contiguous()
        output = source.new_empty((sum(receive), *source.shape[1:]))
        entry = source.element_size() * source.shape[1:].numel()
        self._count(step, (source.shape[0] - send[self.rank]) * entry)
        with self.watched(step):
            work = distributed.all_to_all_single(output, source, receive, send, group=self.group, async_op=True)
        return Pending(self, step, output, source, work)

    def _count(self, step: str, count: int) -> None:
        self.sent[step] += count


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
