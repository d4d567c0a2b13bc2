"""Numbers that live on the device, changed on the host, piece by piece: down, changed, and up again.

    pipeline = HostPipeline(copies_for(device))
    pipeline.start(pieces)       the first pieces go down; what the device is given from now on runs beside that
    pipeline.finish()            the host changes piece after piece; on return the device's stream waits for the last

Two slots of buffers take turns: while the host works on one piece, the next comes down and the last goes up. So the
buffers have a size that does not depend on the tables, and there are none on the device: copies go straight between
its tensors and page-locked host memory.

On CUDA each direction has a stream of its own (the bus has both directions at once). What may not overtake what:

    - a piece comes down after everything that the device was given before ``start``;
    - the host reads a piece once it has come down: it waits, here only;
    - the host writes into a slot's outgoing buffer, or a copy down fills it, once its last content has gone up;
    - a slot's incoming buffers are filled again when the host has done with them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

SLOTS = 2


@dataclass(frozen=True)
class Piece:
    """One part of the work. All tensors are on the device, flat and contiguous.

    ``update(sources, target)`` is called on the host with copies of ``sources`` and with a buffer like ``target``,
    whose content goes to ``target`` afterwards. With ``changes`` the buffer holds what ``target`` holds.
    """

    sources: tuple[Tensor, ...]
    target: Tensor
    update: Callable[[Sequence[Tensor], Tensor], None]
    changes: bool = False


class Copies(Protocol):
    """What is asked of a device. What ``down`` and ``up`` return is awaited with ``wait``."""

    def buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        """Host memory for ``count`` elements that the device can copy to and from."""
        ...

    def begin(self) -> None:
        """Copies from now on begin after what the device has been given so far."""
        ...

    def down(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Copy (host, device) pairs to the host, once ``after`` (what ``up`` returned, or None) is over."""
        ...

    def up(self, target: Tensor, source: Tensor) -> Any:
        """Copy ``source`` (host) to ``target`` (device)."""
        ...

    def wait(self, copy: Any) -> None:
        """The host waits until ``copy`` is over."""
        ...

    def join(self) -> None:
        """What the device is given from now on begins after all copies."""
        ...


@dataclass
class _Slot:
    incoming: list[Tensor] = field(default_factory=list)
    outgoing: Tensor | None = None
    sent: Any = None


@dataclass
class _UnderWay:
    piece: Piece
    slot: _Slot
    sources: list[Tensor]
    target: Tensor
    arrived: Any


class HostPipeline:
    """See the top of this file. ``copies``: of the device that the pieces are on."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._waiting: Iterator[Piece] = iter(())
        self._under_way: deque[_UnderWay] = deque()

    def start(self, pieces: Iterable[Piece]) -> None:
        """Let the first pieces come down. ``pieces`` is read further during ``finish``."""
        assert not self._under_way, "the last round was not finished"
        self._waiting = iter(pieces)
        self._copies.begin()
        for slot in self._slots:
            self._fetch(slot)

    def finish(self) -> None:
        """Change all pieces and send them back. The host waits for each piece to come down."""
        while self._under_way:
            here = self._under_way.popleft()
            self._copies.wait(here.arrived)
            if not here.piece.changes and here.slot.sent is not None:
                self._copies.wait(here.slot.sent)
            here.piece.update(here.sources, here.target)
            here.slot.sent = self._copies.up(here.piece.target, here.target)
            self._fetch(here.slot)
        self._copies.join()

    def _fetch(self, slot: _Slot) -> None:
        piece = next(self._waiting, None)
        if piece is None:
            return
        slot.incoming += [torch.empty(0)] * (len(piece.sources) - len(slot.incoming))
        for index, source in enumerate(piece.sources):
            slot.incoming[index] = self._fitting(slot.incoming[index], source)
        if slot.outgoing is not None and not _fits(slot.outgoing, piece.target):
            self._copies.wait(slot.sent)  # before its buffer is given up
        slot.outgoing = self._fitting(slot.outgoing, piece.target)
        sources = [kept[: one.numel()] for kept, one in zip(slot.incoming, piece.sources, strict=False)]
        target = slot.outgoing[: piece.target.numel()]
        pairs = list(zip(sources, piece.sources, strict=True))
        if piece.changes:
            pairs.append((target, piece.target))
        arrived = self._copies.down(pairs, slot.sent if piece.changes else None)
        self._under_way.append(_UnderWay(piece, slot, sources, target, arrived))

    def _fitting(self, kept: Tensor | None, wanted: Tensor) -> Tensor:
        if kept is not None and _fits(kept, wanted):
            return kept
        return self._copies.buffer(wanted.numel(), wanted.dtype)


def _fits(kept: Tensor, wanted: Tensor) -> bool:
    return kept.dtype == wanted.dtype and kept.numel() >= wanted.numel()


class OnHost:
    """``Copies`` where the device is the host."""

    def buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype)

    def begin(self) -> None:
        pass

    def down(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> None:
        for host, device in pairs:
            host.copy_(device)

    def up(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def wait(self, copy: Any) -> None:
        pass

    def join(self) -> None:
        pass


class OnCuda:
    """``Copies`` of the current CUDA device: a stream for each direction."""

    def __init__(self) -> None:
        self._down, self._up = torch.cuda.Stream(), torch.cuda.Stream()

    def buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def begin(self) -> None:
        for stream in (self._down, self._up):
            stream.wait_stream(torch.cuda.current_stream())

    def down(self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event | None) -> torch.cuda.Event:
        with torch.cuda.stream(self._down):
            if after is not None:
                self._down.wait_event(after)
            for host, device in pairs:
                host.copy_(device, non_blocking=True)
            return self._down.record_event()

    def up(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._up):
            target.copy_(source, non_blocking=True)
            return self._up.record_event()

    def wait(self, copy: torch.cuda.Event) -> None:
        copy.synchronize()

    def join(self) -> None:
        for stream in (self._down, self._up):
            torch.cuda.current_stream().wait_stream(stream)


def copies_for(device: torch.device) -> Copies:
    """The copies between ``device`` and the host."""
    return OnCuda() if device.type == "cuda" else OnHost()
