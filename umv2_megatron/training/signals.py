"""SIGTERM and SIGUSR1 ask a run to save and stop; all ranks agree on the step at which they do."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch

from umv2_megatron.parallel import cpu_platform
from umv2_megatron.parallel.launch import STOP_SIGNALS


class StopRequests:
    """Collects reasons to stop on this rank: a signal, or the time limit of --exit-duration-in-mins.

    Signals are collected inside a ``with`` block only. After it they do what they did before, also one that came when
    the ranks had agreed not to stop; where they have agreed to stop, or an exception leaves the block, all further ones
    are ignored.
    ``agreed`` is a collective: every rank learns whether any rank was asked, at the same step. A training step asks all
    ranks anyway whether its gradients are finite, and settles this with the same question: ``wanted``, ``settle``.

    Args:
        handle_signals: whether to collect signals at all (--exit-signal-handler).
        minutes: the time limit, or None.
        started_at: ``time.monotonic()`` in seconds when the program started, from which the limit counts.
    """

    def __init__(self, handle_signals: bool, minutes: int | None, started_at: float):
        self._asked: int | None = None
        self._stopping = False
        self._deadline = started_at + 60 * minutes if minutes is not None else None
        self._signals = STOP_SIGNALS if handle_signals else ()
        self._previous: list[Any] = []

    def __enter__(self) -> StopRequests:
        self._previous = [signal.signal(number, self._ask) for number in self._signals]
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._stopping or failure is not None:
            # A signal that is sent twice must not end a rank that is about to end with 0, nor torchrun's SIGTERM one
            # that is about to tell which rank has failed.
            return
        for number, handler in zip(self._signals, self._previous):
            # None is a handler that Python did not install, and cannot put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._asked is not None:
            signal.raise_signal(self._asked)

    def _ask(self, number: int, _: object) -> None:
        self._asked = number

    @property
    def wanted(self) -> bool:
        """Whether this rank wants to stop."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._asked is not None or late

    @property
    def stopping(self) -> bool:
        """Whether the ranks have agreed to stop."""
        return self._stopping

    def settle(self, stopping: bool) -> None:
        """What all ranks have come to know from their ``wanted``."""
        self._stopping = stopping

    def agreed(self) -> bool:
        """Whether any rank wants to stop."""
        asked = torch.tensor([float(self.wanted)], device=cpu_platform.device())
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        self.settle(bool(asked.item()))
        return self._stopping

    def reason(self) -> str:
        """What made the ranks stop: the name of a signal, or the time limit. A collective."""
        asked = torch.tensor([float(self._asked or 0)], device=cpu_platform.device())
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(asked.item())).name if asked.item() else "--exit-duration-in-mins"
