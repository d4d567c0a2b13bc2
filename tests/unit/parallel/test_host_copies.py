"""HostPipeline on a stand-in for a device whose copies run as early or as late as its streams allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from umv2_megatron.parallel.host_copies import SLOTS, OnHost, Piece, copies_for
from umv2_megatron.parallel.host_copies import HostPipeline as Pipeline


@dataclass(eq=False)
class Copy:
    """A copy of one direction's queue; it runs after those before it there, and after ``after``."""

    pairs: list[tuple[Tensor, Tensor]]
    queue: list[Copy]
    after: Copy | None = None
    done: bool = False

    def run(self) -> None:
        if self.done:
            return
        for earlier in self.queue[: self.queue.index(self)]:
            earlier.run()
        if self.after is not None:
            self.after.run()
        for target, source in self.pairs:
            target.copy_(source)
        self.done = True


@dataclass
class Queues:
    """``Copies`` with a queue for each direction. ``late``: a copy runs when somebody waits for it, else at once, but
    never before what it has to wait for: a copy down runs before the ones up that it does not wait for."""

    late: bool
    downs: list[Copy] = field(default_factory=list)
    ups: list[Copy] = field(default_factory=list)
    begun: int = 0
    allocated: int = 0

    def buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        self.allocated += count
        return torch.full((count,), torch.nan, dtype=dtype)

    def begin(self) -> None:
        self.begun += 1

    def down(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Copy:
        return self._given(Copy(list(pairs), self.downs, after))

    def up(self, target: Tensor, source: Tensor) -> Copy:
        return self._given(Copy([(target, source)], self.ups))

    def _given(self, copy: Copy) -> Copy:
        copy.queue.append(copy)
        if not self.late:
            copy.run()
        return copy

    def wait(self, copy: Copy) -> None:
        copy.run()

    def join(self) -> None:
        for copy in (*self.downs, *self.ups):
            copy.run()


def doubled(copies: Any, sizes: list[int], changes: bool, rounds: int = 2) -> tuple[Tensor, Tensor]:
    """What a pipeline makes of 2 target + source, piece by piece, and what it should make."""
    total = sum(sizes)
    source, target = torch.arange(total, dtype=torch.float32), torch.arange(total, dtype=torch.float32) * 10
    main, expected = target.clone(), target.clone()
    pipeline = Pipeline(copies)
    for _ in range(rounds):
        pieces, start = [], 0
        for size in sizes:
            part = slice(start, start + size)
            start += size

            def update(sources: Sequence[Tensor], out: Tensor, part: slice = part) -> None:
                kept = out if changes else main[part]
                kept.mul_(2).add_(sources[0])
                out.copy_(kept)

            pieces.append(Piece((source[part],), target[part], update, changes))
        pipeline.start(pieces)
        pipeline.finish()
        expected = 2 * expected + source
    return target, expected


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("sizes", [[5] * 7 + [2], [3, 8, 8, 1], [4], []], ids=str)
def test_every_order_that_the_device_may_choose(sizes: list[int], late: bool, changes: bool) -> None:
    copies = Queues(late)
    found, expected = doubled(copies, sizes, changes)
    assert torch.equal(found, expected)
    assert copies.begun == 2


def test_buffers_do_not_grow_with_the_number_of_pieces() -> None:
    few, many = Queues(True), Queues(True)
    doubled(few, [6] * SLOTS, False)
    doubled(many, [6] * 40, False)
    assert few.allocated == many.allocated == 2 * 6 * SLOTS


def test_only_the_first_pieces_come_down_before_the_end() -> None:
    copies = Queues(True)
    pieces = [Piece((torch.zeros(2),), torch.zeros(2), lambda sources, out: out.fill_(1.0)) for _ in range(5)]
    pipeline = Pipeline(copies)
    pipeline.start(pieces)
    assert (len(copies.downs), len(copies.ups)) == (SLOTS, 0)
    pipeline.finish()
    assert all(bool(piece.target.eq(1).all()) for piece in pieces)


def test_a_cpu_copies_at_once() -> None:
    copies = copies_for(torch.device("cpu"))
    assert isinstance(copies, OnHost)
    found, expected = doubled(copies, [4, 4, 3], True)
    assert torch.equal(found, expected)
