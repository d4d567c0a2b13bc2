"""A second CUDA stream on which the memory branch of a block runs beside its dense FFN (--memory-stream).

    seen = branch.fork(x, tables)     the side stream waits for what the main stream has been given so far
    with branch.beside(): ...         work on the side stream; the FFN's goes to the main stream
    y + branch.join(memory)           the main stream waits for the side stream

    branch.follow(a, b)               as fork, for tensors outside autograd
    branch.lend(c)                    as join, for a tensor whose arrival the main stream awaits in another way

All blocks use one side stream, so its work stays in order. Without CUDA, or with the flag off, ``INLINE`` takes its
place and all of this is nothing. "Main" is the stream that is current when ``fork`` is called.

**Forward.** The side stream reads x and parameters, which the main stream wrote before the fork; the main stream reads
the output after the join. The caching allocator gives a freed block to the next tensor of the stream it was allocated
on, so a tensor that crosses over is recorded on the other stream (``Tensor.record_stream``): x, whose last reference
may be the one that the side stream's autograd nodes hold, and the output. (Where mcore recomputes the norm before the
slot, x gets new memory that is not recorded. The node that frees it comes just before ``fork``, whose wait makes it
safe to use again, and in between nothing is allocated on the main stream.)

**Backward.** Autograd runs the backward of an operation on the stream of its forward. Where a gradient passes from a
node to one on another stream, the engine makes the second wait for the first and records the tensor
(torch/csrc/autograd/input_buffer.cpp). So the side stream's backward starts when the gradient of the sum is there, and
runs beside the FFN's. All that the engine cannot know is the gradient of the value tables: the lookup adds it to
``main_grad`` itself and returns None (ops/main_grad.py), and where there is no gradient tensor there is no waiting.
mcore's DDP hangs its hook on the table's gradient accumulator, a node of the main stream. Called right after the
lookup's backward it would start the reduction of a bucket (--overlap-grad-reduce) that the side stream has not filled:
NCCL waits for the current stream only (``start_grad_sync`` in param_and_grad_buffer.py of mcore 0.16.1), or, with
several optimizer instances, mcore's own stream for the default one. ``fork`` therefore is an autograd node of its own,
to which the tables are inputs. An accumulator runs when all nodes that use the parameter have run; now ``fork`` is one
of them, the last of the branch, on the main stream, after the engine made that wait for the gradient of x, which the
side stream computes after its additions to the tables. A table that several layers use waits for all their forks. The
price: the reduction starts after this block's FFN backward and not beside it.

**Gradient accumulation.** Without a reduction the accumulator's hook does nothing with main_grad, and the additions of
the next micro-batch follow on the same side stream. What reads main_grad at the end of the step does so on the main
stream, after every fork.

**Activation recompute.** Fork and join lie inside the recomputed block. Its first forward makes no nodes, but waits as
always. In the recompute, the inner backward ends with the gradient of x, that is with ``fork`` on the main stream.

**CUDA graphs.** Waiting is an event recorded on one stream and awaited on the other, which a capture follows into
the side stream and, by the join, back; the backward leaves no work behind on it. The forward of a slot does where picks
are sorted after the join (``FFNWithMemory.forward``), which a capture would have to join: --memory-stream is refused
with graphs. Nothing here waits on the host.

**Process groups.** An exchange of a sharded table is started and awaited on the side stream, forward and backward,
because both ends of it are nodes of that stream. Collectives of one group run in the order in which the host starts
them, whatever the stream, and that order is the same on all ranks. The exchanges of replicated parameters' gradients
(tensor-parallel ranks that share tokens) are hooks of accumulators, on the main stream, with a gradient the engine has
waited for.

**--overlap-param-gather**: mcore waits for a gathered bucket once, on the stream of the first module that asks, and a
bucket of dense parameters serves both streams. So a block waits for all its buckets on the main stream before it forks
(``model/ffn_with_memory.gather_before_forks``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Streams(Protocol):
    """What is asked of a device; ``_Cuda`` has it, tests put something in its place that writes down the calls."""

    def create(self) -> Any:
        """A new stream."""
        ...

    def current(self) -> Any:
        """The stream that work is given to now."""
        ...

    def use(self, stream: Any) -> contextlib.AbstractContextManager:
        """Inside, work is given to ``stream``."""
        ...

    def wait(self, waiting: Any, awaited: Any) -> None:
        """What is given to ``waiting`` from now on begins after what ``awaited`` has been given so far."""
        ...

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Do not reuse the memory of ``tensor`` before ``stream`` has done what it has been given when it is freed."""
        ...


class Branch(Protocol):
    """Where the memory branch runs."""

    apart: bool
    """Whether on a stream of its own."""

    def fork(self, x: Tensor, tables: Iterable[Tensor]) -> Tensor:
        """``x`` for the branch; its backward adds to the ``main_grad`` of ``tables``."""
        ...

    def beside(self) -> contextlib.AbstractContextManager:
        """Inside, the branch's work is given to its stream."""
        ...

    def join(self, output: Tensor) -> Tensor:
        """``output`` of the branch, to be used by the caller's stream."""
        ...

    def follow(self, *tensors: Tensor) -> None:
        """The branch reads ``tensors`` of the caller's stream, which it waits for."""
        ...

    def lend(self, tensor: Tensor) -> Tensor:
        """``tensor`` of the branch, to be used by the caller's stream once that has waited for it by other means, such
        as the end of a collective."""
        ...


class Inline:
    """The branch runs on the caller's stream, or on the CPU."""

    apart = False

    def fork(self, x: Tensor, tables: Iterable[Tensor]) -> Tensor:
        """``x``."""
        return x

    def beside(self) -> contextlib.AbstractContextManager:
        """Nothing."""
        return contextlib.nullcontext()

    def join(self, output: Tensor) -> Tensor:
        """``output``."""
        return output

    def follow(self, *tensors: Tensor) -> None:
        """Nothing."""

    def lend(self, tensor: Tensor) -> Tensor:
        """``tensor``."""
        return tensor


class SideStream:
    """The branch runs on a stream of its own, see the top of this file."""

    apart = True

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._side = streams.create()

    def fork(self, x: Tensor, tables: Iterable[Tensor]) -> Tensor:
        """``x``, a view of it that a node of the main stream made."""
        seen = _Fork.apply(x, *tables)
        self._streams.wait(self._side, self._streams.current())
        self._streams.keep(seen, self._side)
        return seen

    def beside(self) -> contextlib.AbstractContextManager:
        """Inside, work is given to the side stream."""
        return self._streams.use(self._side)

    def join(self, output: Tensor) -> Tensor:
        """``output``, once the main stream waits for it."""
        main = self._streams.current()
        self._streams.wait(main, self._side)
        self._streams.keep(output, main)
        return output

    def follow(self, *tensors: Tensor) -> None:
        """The side stream waits for the main stream, and keeps ``tensors``."""
        self._streams.wait(self._side, self._streams.current())
        for each in tensors:
            self._streams.keep(each, self._side)

    def lend(self, tensor: Tensor) -> Tensor:
        """``tensor``, kept for the main stream."""
        self._streams.keep(tensor, self._streams.current())
        return tensor


class _Fork(torch.autograd.Function):
    """x unchanged; the accumulators of the tables run after this node's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tables: Tensor) -> Tensor:
        ctx.num_tables = len(tables)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return (grads[0], *[None] * ctx.num_tables)


class _Cuda:
    """``Streams`` of the current CUDA device."""

    def create(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream()

    def use(self, stream: torch.cuda.Stream) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(stream)

    def wait(self, waiting: torch.cuda.Stream, awaited: torch.cuda.Stream) -> None:
        waiting.wait_stream(awaited)

    def keep(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        tensor.record_stream(stream)


INLINE = Inline()


def branch_for(device: torch.device, wanted: bool) -> Branch:
    """The branch of a forward on ``device``: a side stream if it is ``wanted`` and ``device`` is a CUDA device."""
    return _side_stream(device) if wanted and device.type == "cuda" else INLINE


@functools.cache
def _side_stream(device: torch.device) -> SideStream:
    # Accumulators belong to the stream on which DDP was made, the main one, and gradients come from the side stream:
    # the engine makes the one wait for the other, as it should, and would warn of it.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    with torch.cuda.device(device):
        return SideStream(_Cuda())
