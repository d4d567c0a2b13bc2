"""SIGTERM and SIGUSR1 ask a run to save and stop; all ranks agree on the step at which they do."""

from __future__ import annotations

import signal
import time

import torch

from umv2_megatron.parallel import cpu_platform

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Collects reasons to stop on this rank: a signal, or the time limit of --exit-duration-in-mins.

    ``agreed`` is a collective: every rank learns whether any rank was asked, at the same step.
    """

    def __init__(self, handle_signals: bool, minutes: int | None):
        self._asked = False
        self._deadline = time.monotonic() + 60 * minutes if minutes is not None else None
        if handle_signals:
            for number in SIGNALS:
                signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank wants to stop."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        asked = torch.tensor([float(self._asked or late)], device=cpu_platform.device())
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())
